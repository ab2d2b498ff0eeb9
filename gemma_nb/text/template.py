"""Conversations to token ids: the turns a checkpoint was trained on, or a transcript it continues.

Every segment (a user's turn, a reply, what stands between them) is tokenized on its own.  So the
ids of a conversation are a prefix of its continuation's ids, as long as replies are given by the
ids that were sampled, and a KV cache filled for one serves the other.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from gemma_nb.errors import TemplateError
from gemma_nb.presets import ChatTemplates
from gemma_nb.text.tokenizer import Tokenizer

Role = Literal["user", "model"]

_START, _END = "<start_of_turn>", "<end_of_turn>"


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn as a template sees it.

    Attributes:
      role: who speaks.
      text: what is said.
      ids: of a model's turn, the tokens it sampled without those that ended it; used instead of
        tokenizing `text` again.
    """

    role: Role
    text: str
    ids: tuple[int, ...] | None = None


class Template(abc.ABC):
    """How a conversation is written for the model.

    A template of one's own is best a change of one of those below, or a `MessageTemplate`.

    Attributes:
      name: as in `ChatSession(template=name)`.
      default_system: the system text where a session sets none.
      strip_reply: a reply's text starts with a space that belongs to the form, not to the reply.
      stop_strings: a reply ends before the first of these.
    """

    name: ClassVar[str]
    default_system: str | None = None
    strip_reply: bool = False
    stop_strings: tuple[str, ...] = ()

    @abc.abstractmethod
    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], system: str | None = None
    ) -> list[int]:
        """The whole context, `<bos>` included, ready for the reply if the user spoke last.

        Args:
          tokenizer: of the checkpoint.
          messages: turns of user and model by turns, the user's first.
          system: None for `default_system`, "" for none.

        Raises:
          ValueError: two turns of the same role in a row, or the model speaks first.
        """

    @staticmethod
    def check_turns(messages: Sequence[Message]) -> None:
        """Refuses turns that are not the user's and the model's by turns.

        Raises:
          ValueError: they are not.
        """
        for index, message in enumerate(messages):
            expected = "model" if index % 2 else "user"
            if message.role != expected:
                raise ValueError(
                    f"message {index} is the {message.role}'s, expected the {expected}'s: user and "
                    "model speak by turns, the user first"
                )

    def check_system(self, system: str | None) -> None:
        """Refuses a system text that the template has no place for; most have one for any.

        Raises:
          TemplateError: there is none.
        """
        del system

    def reply_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """A reply's text as the tokens that the model would write, without what closes it."""
        return tokenizer.encode(text)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Tokens that end a reply: `<eos>` and `<end_of_turn>`, where the vocabulary has them."""
        control = tokenizer.control
        ends = {tokenizer.eos_id, *(control[end] for end in ("<eos>", _END) if end in control)}
        return frozenset(ends - {-1})

    def forbidden_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Tokens that are never part of a reply: every control piece but those that end it."""
        never = {*tokenizer.control.values(), tokenizer.unk_id} - self.stop_ids(tokenizer)
        return tuple(sorted(never - {-1}))


class MessageTemplate(Template):
    """A template that writes each message on its own, whatever stands around it."""

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], system: str | None = None
    ) -> list[int]:
        """See `Template`."""
        self.check_turns(messages)
        system = self.default_system if system is None else system
        ids = [tokenizer.bos_id, *self._head(tokenizer, system or "")]
        for index, message in enumerate(messages):
            if message.role == "user":
                ids += self._user(tokenizer, message.text, system if index == 0 else "")
            else:
                ids += self._model(tokenizer, message)
        return ids

    def _head(self, tokenizer: Tokenizer, system: str) -> list[int]:
        """What stands before the first turn, after `<bos>`."""
        return []

    @abc.abstractmethod
    def _user(self, tokenizer: Tokenizer, text: str, system: str | None) -> list[int]:
        """A user's turn up to where the reply begins; `system` is given with the first."""

    @abc.abstractmethod
    def _model(self, tokenizer: Tokenizer, message: Message) -> list[int]:
        """A reply and what closes it."""


@dataclasses.dataclass(frozen=True)
class GemmaTemplate(MessageTemplate):
    """The turns of instruction-tuned Gemma; system text leads the first user turn.

    Source: https://ai.google.dev/gemma/docs/core/prompt-structure
    """

    name: ClassVar[str] = "gemma"

    def _user(self, tokenizer: Tokenizer, text: str, system: str | None) -> list[int]:
        lead = f"{system}\n\n" if system else ""
        turn = tokenizer.encode(f"user\n{lead}{text.strip()}")
        return [
            *self._turn(tokenizer, turn),
            _piece(tokenizer, _START),
            *tokenizer.encode("model\n"),
        ]

    def _model(self, tokenizer: Tokenizer, message: Message) -> list[int]:
        reply = message.ids
        if reply is None:
            reply = tuple(self.reply_ids(tokenizer, message.text))
        return [*reply, _piece(tokenizer, _END), *tokenizer.encode("\n")]

    def reply_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """See `Template`."""
        return tokenizer.encode(text.strip())

    def _turn(self, tokenizer: Tokenizer, ids: list[int]) -> list[int]:
        start, end = _piece(tokenizer, _START), _piece(tokenizer, _END)
        return [start, *ids, end, *tokenizer.encode("\n")]


def _piece(tokenizer: Tokenizer, piece: str) -> int:
    """The id of one of Gemma's control pieces."""
    if piece not in tokenizer.control:
        raise TemplateError(
            f"the vocabulary has no {piece!r}, which Gemma's turns need: pass template="
            '"transcript" or "none", or one of your own'
        )
    return tokenizer.control[piece]


@dataclasses.dataclass(frozen=True)
class TranscriptTemplate(MessageTemplate):
    """A transcript for base checkpoints, which continue text and know no turns.

    A system line and example turns show the form and the tone; the model continues after
    "Assistant:" and is stopped where a blank line or the next speaker would follow.

    Attributes:
      default_system: what kind of text this is.
      examples: (question, answer) pairs that stand before the conversation.
      labels: names of the two speakers.
      stop_strings: see `Template`.
      strip_reply: the space after "Assistant:" is the model's to write, so that its first word
        is tokenized as words inside a text are.
    """

    name: ClassVar[str] = "transcript"

    # Chosen on the 270M base model, which with these answers simple questions in a sentence, ends
    # there, and greets back.
    default_system: str | None = (
        "The following is a conversation between a user and a helpful assistant. The assistant "
        "answers every question correctly, in one or two short sentences."
    )
    examples: tuple[tuple[str, str], ...] = (
        ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
        ("Who wrote Don Quixote?", "Don Quixote was written by Miguel de Cervantes."),
        ("How are you today?", "I am fine, thank you. What would you like to know?"),
        (
            "Why do leaves fall in autumn?",
            "Trees drop their leaves in autumn to save water during the winter.",
        ),
        ("How many legs does a spider have?", "A spider has eight legs."),
        ("Hello!", "Hello! How can I help you?"),
    )
    labels: tuple[str, str] = ("User", "Assistant")
    stop_strings: tuple[str, ...] = ("\n\n", "\nUser:", "\nAssistant:")
    strip_reply: bool = True

    def _head(self, tokenizer: Tokenizer, system: str) -> list[int]:
        ids = tokenizer.encode(system.strip())
        for question, answer in self.examples:
            ids += self._user(tokenizer, question, None)
            ids += self._model(tokenizer, Message("model", answer))
        return ids

    def _user(self, tokenizer: Tokenizer, text: str, system: str | None) -> list[int]:
        del system  # stands in the head
        user, model = self.labels
        return tokenizer.encode(f"\n\n{user}: {text.strip()}\n{model}:")

    def _model(self, tokenizer: Tokenizer, message: Message) -> list[int]:
        if message.ids is None:
            return self.reply_ids(tokenizer, message.text)
        return list(message.ids)

    def reply_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """See `Template`."""
        return tokenizer.encode(f" {text.strip()}")


@dataclasses.dataclass(frozen=True)
class RawTemplate(MessageTemplate):
    """No form at all: the model continues the text as typed."""

    name: ClassVar[str] = "none"

    def _head(self, tokenizer: Tokenizer, system: str) -> list[int]:
        return tokenizer.encode(system)

    def _user(self, tokenizer: Tokenizer, text: str, system: str | None) -> list[int]:
        del system  # stands in the head
        return tokenizer.encode(text)

    def _model(self, tokenizer: Tokenizer, message: Message) -> list[int]:
        if message.ids is None:
            return self.reply_ids(tokenizer, message.text)
        return list(message.ids)


_BY_NAME: dict[str, type[Template]] = {
    template.name: template for template in (GemmaTemplate, TranscriptTemplate, RawTemplate)
}


def resolve_template(
    template: str | Template | None,
    tuning: str | None = None,
    own: ChatTemplates | None = None,
    tokenizer: Tokenizer | None = None,
) -> Template:
    """A template by name, as a Jinja text, or as it is.

    Args:
      template: a name; "auto" or None takes the checkpoint's own, or else by its tuning; "jinja" or
        the name of one of several takes the checkpoint's own; a text with "{{" or "{%" is one.
      tuning: "instruction" speaks in turns, "base" does not.
      own: the templates of the checkpoint's files.
      tokenizer: of the checkpoint.

    Raises:
      ValueError: an unknown name.
      TemplateError: a chat template that cannot be followed.
    """
    if isinstance(template, Template):
        return template
    template = "auto" if template is None else template
    if template == "auto" and own is None:
        return GemmaTemplate() if tuning == "instruction" else TranscriptTemplate()
    if isinstance(template, str) and template in _BY_NAME:
        return _BY_NAME[template]()
    names = () if own is None else ("auto", "jinja", *(name for name, _ in own.sources))
    is_source = isinstance(template, str) and ("{{" in template or "{%" in template)
    if not isinstance(template, str) or not (is_source or template in names):
        known = dict.fromkeys((*(names or ("auto",)), *_BY_NAME))
        raise ValueError(
            f"unknown template {template!r}; expected {', '.join(map(repr, known))} or a Template "
            "of your own, which may be a text in Jinja"
        )
    from gemma_nb.text import chat_template  # which needs Jinja

    if is_source:
        return chat_template.from_text(template, own, tokenizer)
    assert own is not None
    found = chat_template.from_files(own, "default" if template == "auto" else template, tokenizer)
    return found or GemmaTemplate()


def template_class(name: str) -> type[Template] | None:
    """This package's template of a name."""
    if name == "jinja":
        from gemma_nb.text.chat_template import JinjaTemplate

        return JinjaTemplate
    return _BY_NAME.get(name)
