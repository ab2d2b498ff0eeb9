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
        for index, message in enumerate(messages):
            expected = "model" if index % 2 else "user"
            if message.role != expected:
                raise ValueError(
                    f"message {index} is the {message.role}'s, expected the {expected}'s: user and "
                    "model speak by turns, the user first"
                )
        system = self.default_system if system is None else system
        ids = [tokenizer.bos_id, *self._head(tokenizer, system or "")]
        for index, message in enumerate(messages):
            if message.role == "user":
                ids += self._user(tokenizer, message.text, system if index == 0 else "")
            else:
                ids += self._model(tokenizer, message)
        return ids

    def reply_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """A reply's text as the tokens that the model would write, without what closes it."""
        return tokenizer.encode(text)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Tokens that end a reply: `<eos>` and, where the vocabulary has it, `<end_of_turn>`."""
        ends = {tokenizer.eos_id, tokenizer.control.get(_END, tokenizer.eos_id)}
        return frozenset(ends - {-1})

    def forbidden_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Tokens that are never part of a reply: every control piece but those that end it."""
        never = {*tokenizer.control.values(), tokenizer.unk_id} - self.stop_ids(tokenizer)
        return tuple(sorted(never - {-1}))

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
class GemmaTemplate(Template):
    """The turns of instruction-tuned Gemma; system text leads the first user turn.

    Source: https://ai.google.dev/gemma/docs/core/prompt-structure
    """

    name: ClassVar[str] = "gemma"

    def _user(self, tokenizer: Tokenizer, text: str, system: str | None) -> list[int]:
        lead = f"{system}\n\n" if system else ""
        turn = tokenizer.encode(f"user\n{lead}{text.strip()}")
        return [
            *self._turn(tokenizer, turn),
            tokenizer.control[_START],
            *tokenizer.encode("model\n"),
        ]

    def _model(self, tokenizer: Tokenizer, message: Message) -> list[int]:
        reply = message.ids
        if reply is None:
            reply = tuple(self.reply_ids(tokenizer, message.text))
        return [*reply, tokenizer.control[_END], *tokenizer.encode("\n")]

    def reply_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """See `Template`."""
        return tokenizer.encode(text.strip())

    def _turn(self, tokenizer: Tokenizer, ids: list[int]) -> list[int]:
        control = tokenizer.control
        return [control[_START], *ids, control[_END], *tokenizer.encode("\n")]


@dataclasses.dataclass(frozen=True)
class TranscriptTemplate(Template):
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
class RawTemplate(Template):
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


def resolve_template(template: str | Template | None, tuning: str | None = None) -> Template:
    """A template by name; "auto" takes `tuning`: "instruction" speaks in turns, "base" does not.

    Raises:
      ValueError: an unknown name.
    """
    if isinstance(template, Template):
        return template
    if template is None or template == "auto":
        return GemmaTemplate() if tuning == "instruction" else TranscriptTemplate()
    if not isinstance(template, str) or template not in _BY_NAME:
        raise ValueError(
            f"unknown template {template!r}; expected 'auto', {', '.join(map(repr, _BY_NAME))} or "
            "a Template of your own"
        )
    return _BY_NAME[template]()
