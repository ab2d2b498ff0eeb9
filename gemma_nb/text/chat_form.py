"""What a chat template writes: before a reply, after it, and whether that is what Gemma's writes.

Found out by rendering small conversations with marks in the place of what is said.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from gemma_nb.text.sandbox import Program, TemplateFault
from gemma_nb.text.template import Role

# What a control piece looks like in most vocabularies: "<eos>", "<|im_end|>", "[INST]".
PIECE = re.compile(r"<[^<>\[\]\s]+>|\[[^<>\[\]\s]+\]")
# Which ends of a reply a template may take white space from.
TRIMS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {"": str, "both": str.strip, "left": str.lstrip, "right": str.rstrip}
)
NOT_ONCE = "it does not write each reply once, as it is"
NOT_AS_BEFORE = "it writes what stands before a reply differently once the conversation goes on"
REWRITTEN = "it rewrites an earlier reply instead of repeating it as it was"

Said = Sequence[tuple[Role, str]]
_MARK = "\U0010fffd"  # for private use: no template has it


@dataclasses.dataclass(frozen=True)
class Renderer:
    """A chat template with what it is told beside the messages.

    Attributes:
      source: the template, in Jinja.
      tokens: (name, text) pairs of the special tokens.
      now: the time, in ISO format.
      role: how it calls who replies.
    """

    source: str
    tokens: tuple[tuple[str, str], ...]
    now: str = "2000-01-01"
    role: str = "assistant"

    def render(self, said: Said, system: str = "", *, prompt: bool) -> str:
        """The text of a conversation, with what asks for a reply if there is to be a `prompt`.

        Raises:
          TemplateFault: the template fails on it.
        """
        roles = {"user": "user", "model": self.role}
        lead = [{"role": "system", "content": system}] if system else []
        values = {
            **dict(self.tokens),
            "messages": [*lead, *({"role": roles[role], "content": text} for role, text in said)],
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        return _program(self.source).render(datetime.datetime.fromisoformat(self.now), values)


@functools.lru_cache(maxsize=8)
def _program(source: str) -> Program:
    return Program(source)


@dataclasses.dataclass(frozen=True)
class Form:
    """What a template writes around replies.

    Attributes:
      role: how it calls who replies: "assistant", or "model".
      header: what it writes between what it takes for the prompt of a reply and the reply.
      lead: white space before a reply, which is the model's to write.
      trim: which ends of a reply it takes white space from, see `TRIMS`.
      after: what it writes after the last reply of a conversation.
      opened: what it writes between a reply and what the user says next.
      stop_strings: what ends a reply, also where it is a token of its own in the vocabulary.
    """

    role: str
    header: str
    lead: str
    trim: str
    after: str
    opened: str
    stop_strings: tuple[str, ...]


def form_of(renderer: Renderer) -> Form:
    """The form, by conversations of one and of two exchanges.

    Raises:
      TemplateFault: the template fails on them, or cannot be split by message.
    """
    faults = []
    for role in ("assistant", "model"):
        try:
            return _form(dataclasses.replace(renderer, role=role))
        except TemplateFault as fault:
            faults.append(fault)
    raise faults[0]


def _form(renderer: Renderer) -> Form:
    render = renderer.render
    asked, replied, again, last = (f"{_MARK}{i}{_MARK}" for i in range(4))
    talk: Said = [("user", asked), ("model", replied), ("user", again), ("model", last)]
    prompt = render(talk[:1], prompt=True)
    before, after = _around(render(talk[:2], prompt=False), replied)
    if asked not in prompt:
        raise TemplateFault("it leaves out what the user says")
    if not before.startswith(prompt):
        raise TemplateFault(
            "what it writes to ask for a reply is not what it writes before one that is there"
        )
    begun = before[len(prompt) :]
    header = begun.rstrip(" ") if begun.strip() else ""
    first, between = _around(render(talk[:3], prompt=True), replied)
    _, later = _around(render(talk, prompt=False), replied)
    if first != before or _around(later, last)[0] != between + begun:
        raise TemplateFault(NOT_AS_BEFORE)
    if again not in between:
        raise TemplateFault("it leaves out what the user says later on")
    opened, _, asks = between.partition(again)
    return Form(
        renderer.role,
        header,
        begun[len(header) :],
        _trim(renderer, asked, replied),
        after,
        opened,
        _stops(opened, asks + header, [text for _, text in renderer.tokens]),
    )


def _around(text: str, mark: str) -> tuple[str, str]:
    """What stands before and after a mark, which has to be there once."""
    before, *after = text.split(mark)
    if len(after) != 1:
        raise TemplateFault(NOT_ONCE)
    return before, after[0]


def _trim(renderer: Renderer, asked: str, replied: str) -> str:
    """Which ends of a reply lose their white space."""
    spaced = f"\n{replied}\n"
    before, after = _around(
        renderer.render([("user", asked), ("model", replied)], prompt=False), replied
    )
    text = renderer.render([("user", asked), ("model", spaced)], prompt=False)
    for name, trimmed in TRIMS.items():
        if text == before + trimmed(spaced) + after:
            return name
    raise TemplateFault(REWRITTEN)


def _stops(opened: str, asks: str, special: Sequence[str]) -> tuple[str, ...]:
    """What ends a reply: the token that closes it, or else what another turn begins with.

    Args:
      opened: what stands between a reply and what the user says next.
      asks: what stands between that and the next reply.
      special: texts of the special tokens.
    """
    start = opened.strip()
    piece = PIECE.match(start)
    known = [text for text in special if text and start.startswith(text)]
    if piece is not None or known:
        return (max([piece[0] if piece else "", *known], key=len),)
    stops = []
    for text in (opened, asks):
        line = text.strip().partition("\n")[0].rstrip()
        white = text[: len(text) - len(text.lstrip())]
        if line and (text is opened or "\n" in white):
            stops += [white + line, "\n" + line if "\n" in white else line]
    return tuple(dict.fromkeys(stops or ([opened] if opened else [])))


@functools.lru_cache(maxsize=8)
def check_system(renderer: Renderer) -> None:
    """Refuses a template that has no place for a system text.

    Raises:
      TemplateFault: it has none.
    """
    remedy = "leave the system text out, or put it into the first message"
    system = f"{_MARK}s{_MARK}"
    try:
        text = renderer.render([("user", "a")], system, prompt=True)
    except TemplateFault as fault:
        raise TemplateFault(f"it takes no system text ({fault}): {remedy}") from None
    if system not in text:
        raise TemplateFault(f"it leaves the system text out: {remedy}")


def is_gemmas(renderer: Renderer) -> bool:
    """Whether a template writes what `GemmaTemplate` does, whatever it looks like.

    A system text may be refused, as the templates of Gemma 1 and 2 do, or lead the first turn.
    """

    def turn(role: str, text: str) -> str:
        return f"<start_of_turn>{role}\n{text}<end_of_turn>\n"

    talk: Said = [("user", " Hi\n"), ("model", "\nHello! "), ("user", "Bye")]
    asks = "<start_of_turn>model\n"
    one = turn("user", "Hi") + turn("model", "Hello!")
    expected = [turn("user", "Hi") + asks, one, one + turn("user", "Bye") + asks]
    bos = dict(renderer.tokens).get("bos_token", "<bos>")
    try:
        written = [
            renderer.render(talk[:count], prompt=count != 2).removeprefix(bos)
            for count in (1, 2, 3)
        ]
    except TemplateFault:
        return False
    if written != expected:
        return False
    try:
        led = renderer.render(talk[:1], "Sing.", prompt=True)
    except TemplateFault:
        return True
    return led.removeprefix(bos) == turn("user", "Sing.\n\nHi") + asks
