"""The chat template that a checkpoint brings along, followed message by message.

Such a template is one Jinja program for a whole conversation.  A session needs more: what stands
before each reply may not change when the conversation goes on, since the KV cache and the evidence
of earlier replies are of those tokens.  So every conversation is rendered with marks in the place
of its replies, and what stands between the marks is what the template says: text that is tokenized
once, with the replies' own tokens in between.  A template that writes one message differently when
another one follows is refused by name.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NoReturn

from gemma_nb.errors import TemplateError
from gemma_nb.presets import ChatTemplates
from gemma_nb.text import chat_form
from gemma_nb.text.chat_form import PIECE, TRIMS, Renderer, Said
from gemma_nb.text.prefix import shared_prefix
from gemma_nb.text.sandbox import TemplateFault
from gemma_nb.text.template import Message, Template
from gemma_nb.text.tokenizer import Tokenizer

_WAYS_OUT = (
    'Pass template="gemma" (Gemma\'s own turns), "transcript" or "none" (the text as it is), or '
    "another Jinja template as text"
)
_patterns: weakref.WeakKeyDictionary[Tokenizer, re.Pattern[str]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class JinjaTemplate(Template):
    """A chat template in Jinja, as transformers renders it.

    `<bos>` leads a conversation also where the template does not write it, unless the checkpoint
    says that none does.  What the template writes as control pieces are control tokens; what a
    user writes never is.

    Attributes:
      source: the template.
      tokens: (name, text) pairs that it may use, such as ("eos_token", "<eos>").
      add_bos: see above.
      now: the time that it is told, in ISO format: that of the session's beginning, since what
        stands before a reply may not change.
      role, header, lead, trim, after, opened, stop_strings: see `chat_form.Form`.
      strip_reply: whether there is a `lead`.
    """

    name: ClassVar[str] = "jinja"

    source: str
    tokens: tuple[tuple[str, str], ...] = ()
    add_bos: bool = True
    now: str = "2000-01-01"
    role: str = "assistant"
    header: str = ""
    lead: str = ""
    trim: str = ""
    after: str = ""
    opened: str = ""
    strip_reply: bool = False
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        datetime.datetime.fromisoformat(self.now)
        if self.trim not in TRIMS:
            raise ValueError(f"trim must be one of {', '.join(map(repr, TRIMS))}")

    @classmethod
    def of(cls, source: str, tokens: Mapping[str, str], *, add_bos: bool = True) -> JinjaTemplate:
        """A template whose form is found by rendering a conversation of two exchanges.

        Args:
          source: in Jinja.
          tokens: texts of the special tokens, by the names that templates use.
          add_bos: see the class.

        Raises:
          TemplateError: it is no Jinja, or cannot be split by message.
        """
        now = datetime.datetime.now().isoformat(timespec="seconds")
        renderer = Renderer(source, tuple(sorted(tokens.items())), now)
        try:
            form = chat_form.form_of(renderer)
        except TemplateFault as fault:
            _refuse(str(fault))
        return cls(
            source,
            renderer.tokens,
            add_bos,
            now,
            strip_reply=bool(form.lead),
            **{field.name: getattr(form, field.name) for field in dataclasses.fields(form)},
        )

    @functools.cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.source, self.tokens, self.now, self.role)

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], system: str | None = None
    ) -> list[int]:
        """See `Template`; of no messages, what begins every conversation.

        Raises:
          ValueError: two turns of the same role in a row, or the model speaks first.
          TemplateError: the template fails on these messages, or writes what stood before a reply
            differently now.
        """
        self.check_turns(messages)
        if not messages:
            some = (self.encode(tokenizer, [Message("user", text)], system) for text in "a1")
            first, second = some
            return first[: shared_prefix(first, second)]
        try:
            return self._encode(tokenizer, messages, system or "")
        except TemplateFault as fault:
            _refuse(str(fault))

    def reply_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """See `Template`."""
        text = text.strip() if self.lead else TRIMS[self.trim](text)
        return tokenizer.encode(self.lead + text)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """See `Template`; also what closes a reply here, and what the files call `eos_token`."""
        names = [dict(self.tokens).get("eos_token", ""), *self.stop_strings]
        found = {tokenizer.control[name] for name in names if name in tokenizer.control}
        return super().stop_ids(tokenizer) | found

    def check_system(self, system: str | None) -> None:
        """Refuses a system text that the template has no place for.

        Raises:
          TemplateError: it has none.
        """
        if system:
            try:
                chat_form.check_system(self._renderer)
            except TemplateFault as fault:
                _refuse(str(fault))

    # --- inside ---------------------------------------------------------------------------------

    def _encode(self, tokenizer: Tokenizer, messages: Sequence[Message], system: str) -> list[int]:
        if system:
            chat_form.check_system(self._renderer)
        free = _unused_characters([system, *(message.text for message in messages)])
        mark, guard = next(free), next(free)
        pattern, control = _pattern(tokenizer), tokenizer.control

        def guarded(text: str) -> str:
            """A text in which nothing reads as a control piece."""
            return pattern.sub(
                lambda m: m[0][0] + guard + m[0][1:] if m[0] in control else m[0], text
            )

        said = [(message.role, guarded(message.text)) for message in messages]
        first, *others = self._segments(said, guarded(system), mark)
        ids = _spelled(tokenizer, first, guard)
        closing = self._closing(tokenizer)
        replies = [message for message in messages if message.role == "model"]
        for reply, segment in zip(replies, others, strict=True):
            ids += self.reply_ids(tokenizer, reply.text) if reply.ids is None else reply.ids
            if not segment.startswith(closing):
                raise TemplateFault("what it writes after a reply differs from turn to turn")
            ids += _spelled(tokenizer, closing, "")
            if reply is not messages[-1]:
                ids += _spelled(tokenizer, segment[len(closing) :], guard)
        if self.add_bos and tokenizer.bos_id >= 0 and ids[:1] != [tokenizer.bos_id]:
            return [tokenizer.bos_id, *ids]
        return ids

    def _segments(self, said: Said, system: str, mark: str) -> list[str]:
        """What stands before, between and after the replies.

        Raises:
          TemplateFault: a reply is not in the text as it is, or the text before it depends on what
            comes after it.
        """
        segments = self._split(said, system, mark)
        self._check_replies(said, system, mark, segments)
        asked = said[:-2] if said[-1][0] == "user" else said[:-1]
        if asked:
            before = self._split(asked, system, mark)
            if before != segments[: len(before)]:
                raise TemplateFault(chat_form.NOT_AS_BEFORE)
        return segments

    def _closing(self, tokenizer: Tokenizer) -> str:
        """What stands with a reply of what follows it: no token reaches beyond its end."""
        after, opened = self.after, self.opened
        if opened.startswith(after):
            following = PIECE.match(opened, len(after))
            pieces = [following, *(m for m in PIECE.finditer(after) if m.end() == len(after))]
            if any(piece is not None and piece[0] in tokenizer.control for piece in pieces):
                return after
        first = PIECE.match(after)
        alone = first is not None and first[0] in tokenizer.control
        return first[0] if first is not None and alone and opened.startswith(first[0]) else ""

    def _split(self, said: Said, system: str, mark: str) -> list[str]:
        """The same, by rendering marks in place of the replies."""
        prompt = said[-1][0] == "user"
        marked = [
            (role, f"{mark}{index}{mark}" if role == "model" else text)
            for index, (role, text) in enumerate(said)
        ]
        rest = self._renderer.render(marked, system, prompt=prompt)
        segments = []
        for role, text in marked:
            if role == "model":
                before, *after = rest.split(text)
                if len(after) != 1:
                    raise TemplateFault(chat_form.NOT_ONCE)
                if not before.endswith(self.header + self.lead):
                    raise TemplateFault("it begins a reply differently from turn to turn")
                segments.append(before.removesuffix(self.lead))
                rest = after[0]
        return [*segments, rest + self.header if prompt else rest]

    def _check_replies(
        self,
        said: Said,
        system: str,
        mark: str,
        segments: Sequence[str],
    ) -> None:
        """Refuses a template that rewrites a reply, as those do that leave out what was thought."""
        prompt = said[-1][0] == "user"
        # An empty reply, of one that was stopped at once say, may be left out altogether.
        shown = [
            (role, text if role == "user" or text.strip() else f"{mark}{index}{mark}")
            for index, (role, text) in enumerate(said)
        ]
        text = self._renderer.render(shown, system, prompt=prompt)
        text += self.header if prompt else ""
        replies = [reply for role, reply in shown if role == "model"]
        for trim in (self.trim, *TRIMS):
            whole = "".join(
                segment + self.lead + TRIMS[trim](reply)
                for segment, reply in zip(segments, replies, strict=False)
            )
            if whole + segments[-1] == text:
                return
        raise TemplateFault(chat_form.REWRITTEN)


def _refuse(problem: str) -> NoReturn:
    raise TemplateError(
        "the chat template, which is that of the checkpoint's files unless you gave one, cannot be "
        f"followed: {problem}.  "
        f"{_WAYS_OUT}"
    )


# --- text to tokens -------------------------------------------------------------------------------


def _unused_characters(texts: Sequence[str]) -> Iterator[str]:
    """Characters for private use that no text holds."""
    used = set().union(*texts)
    return (character for c in range(0x10FFFD, 0xEFFFF, -1) if (character := chr(c)) not in used)


def _pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """What may be a control piece: whatever looks like one, and those that do not."""
    if tokenizer not in _patterns:
        odd = [piece for piece in tokenizer.control if not PIECE.fullmatch(piece)]
        names = [re.escape(piece) for piece in sorted(odd, key=len, reverse=True)]
        _patterns[tokenizer] = re.compile("|".join([*names, PIECE.pattern]))
    return _patterns[tokenizer]


def _spelled(tokenizer: Tokenizer, text: str, guard: str) -> list[int]:
    """Token ids of what a template wrote, control pieces included.

    Args:
      tokenizer: of the checkpoint.
      text: what it wrote.
      guard: a character that keeps what users wrote from being read as a control piece; "" where
        nothing of them is in the text.
    """
    ids: list[int] = []
    start = 0

    def plain(end: int) -> list[int]:
        part = text[start:end]
        return tokenizer.encode(part.replace(guard, "") if guard else part)

    for found in _pattern(tokenizer).finditer(text):
        id_ = tokenizer.control.get(found[0])
        if id_ is not None:
            ids += [*plain(found.start()), id_]
            start = found.end()
    return ids + plain(len(text))


# --- choosing -------------------------------------------------------------------------------------


def from_text(source: str, own: ChatTemplates | None, tokenizer: Tokenizer | None) -> JinjaTemplate:
    """A template of the user's own, in Jinja.

    Raises:
      TemplateError: it cannot be followed.
    """
    own = ChatTemplates() if own is None else own
    return JinjaTemplate.of(source, _tokens(own, tokenizer), add_bos=own.add_bos)


def from_files(own: ChatTemplates, name: str, tokenizer: Tokenizer | None) -> JinjaTemplate | None:
    """The template of a checkpoint; None where it is Gemma's.

    Args:
      own: what its files hold.
      name: which of several; "jinja" is the default one, also where it is Gemma's.
      tokenizer: whose special tokens the template may name, unless the files say others.

    Raises:
      TemplateError: there is none of that name, or it cannot be followed.
    """
    sources = dict(own.sources)
    source = sources.get("default" if name == "jinja" else name)
    if source is None and len(sources) == 1:
        [source] = sources.values()
    if source is None:
        names = ", ".join(map(repr, sources))
        _refuse(f"there are several, {names}, and none is the default: pass one of these names")
    tokens = _tokens(own, tokenizer)
    if name != "jinja" and chat_form.is_gemmas(Renderer(source, tuple(tokens.items()))):
        return None
    return JinjaTemplate.of(source, tokens, add_bos=own.add_bos)


def _tokens(own: ChatTemplates, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Texts of the special tokens, by the names that templates use."""
    found: dict[str, str] = {}
    if tokenizer is not None:
        for name in ("bos", "eos", "pad", "unk"):
            id_ = getattr(tokenizer, f"{name}_id")
            if id_ >= 0:
                [found[f"{name}_token"]] = tokenizer.pieces([id_])
    return {**found, **dict(own.tokens)}
