"""A conversation that outlives its kernel: files, autosave, and what other programs read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from gemma_nb.chat.conversation import Conversation
from gemma_nb.chat.recompute import Recomputation
from gemma_nb.chat.saving import export, journal, session_file
from gemma_nb.chat.saving import messages as imports
from gemma_nb.chat.saving.fingerprint import Fingerprint
from gemma_nb.interventions import Intervention
from gemma_nb.model import GemmaTransformer
from gemma_nb.text.template import Template
from gemma_nb.text.tokenizer import Tokenizer


class KeptConversation(Conversation):
    """How a session is kept; see `ChatSession`."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the whole conversation: every branch, all evidence, and the settings.

        The file is replaced in one step: it is never half written.  Its format is described in
        `gemma_nb.chat.saving`.  A reply that is being made is not in it.

        Args:
          path: a file, conventionally "*.gnb"; one that exists is replaced.

        Returns:
          The file written.

        Raises:
          ConversationError: it cannot be written.
        """
        return self.keeper.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: GemmaTransformer,
        tokenizer: Tokenizer,
        *,
        recompute: bool | None = None,
        template: str | Template | None = None,
        interventions: Sequence[type[Intervention]] = (),
        autosave: bool = False,
        progress: Callable[[float, str], None] | None = None,
    ) -> Self:
        """The conversation that `save` or `autosave` wrote, ready to go on.

        A reply that its kernel did not live to finish is there as far as it had come, with
        `finish_reason` "interrupted"; `resume` goes on with it.

        Args:
          path: the file.  What stands in the journal beside it is read as well.
          model: from `gnb.load`; the one that the conversation was held with.
          tokenizer: from `gnb.load`.
          recompute: what to do under another model, or after an edit or intervention.  None
            refuses.  True computes the evidence of every reply anew, by one pass of this model
            over each (texts and branches stay; where the tokenizer is another one, replies are
            tokenized anew).  False keeps the evidence as it was.
          template: in place of the one that the conversation was held in; needed where that is a
            class of your own.
          interventions: classes of your own that replies were made under (`intervene`).  Without
            them a ConversationWarning names them, and these replies can be read and saved again,
            but not traced or gone on with.
          autosave: go on saving to the same file.
          progress: called with a fraction and a sentence while evidence is recomputed.

        Raises:
          ConversationError: there is no such file, it is damaged, or of a later version.
          ModelMismatchError: the model or the tokenizer is another one; the message says what
            differs and what can be done.
        """
        now = Fingerprint.of(model, tokenizer)
        saved = session_file.read_for(
            model, now, path, recompute=recompute, interventions=interventions
        )
        chat = cls(model, tokenizer, **session_file.arguments(saved, model, template))
        if recompute:
            respell = saved.fingerprint.tokenizer != now.tokenizer
            computation = Recomputation(model, tokenizer, chat.template, chat.capture.top_k)
            computation.tree(saved.tree, respell=respell, progress=progress)
        chat.adopt(saved.tree)
        chat.keeper.opened(saved, now, recomputed=bool(recompute))
        if autosave:
            if saved.left_out:
                journal.set_aside(saved.path)
            chat.autosave = saved.path
        return chat

    @property
    def autosave(self) -> Path | None:
        """The file that the conversation is saved to while it goes on; None to save by hand.

        A path begins it: the file is written, and what is said is appended to a journal beside it
        within a second, also in the middle of a reply, on a thread of its own.  A kernel that dies
        loses no more than that; `load` reads both.  None ends it and folds the journal into the
        file, as happens too when the session or the kernel ends in good order.

        If the file cannot be written later on, the next reply begins with a ConversationWarning.
        So it does when somebody else has changed something there: what was deleted is written
        again; what was put there instead (another file, an older version, another session's) is
        left as it is, and the conversation is saved to a file beside it, which this property then
        names.  What cannot be written there at the end is written to the folder for temporary
        files.  Where the path is a link, what it leads to is written.

        Raises:
          ConversationError: when set: the file cannot be written, or exists and is not this
            conversation's.
        """
        return self.keeper.path

    @autosave.setter
    def autosave(self, path: str | os.PathLike[str] | None) -> None:
        self.keeper.autosave(self, path)

    def messages(self) -> list[dict[str, str]]:
        """The active branch in the common form, `[{"role": "user", "content": "Hello"}, ...]`.

        Roles are "system" (first, where the system text is not the template's own), "user" and
        "assistant".
        """
        return export.messages(self)

    def export(self, to: str | os.PathLike[str] = "markdown") -> str:
        """The active branch for other programs.

        Args:
          to: "markdown", "json" (see `messages`), or the path of a file to write, whose ending
            says which: ".md", ".markdown" or ".json".

        Returns:
          The text.

        Raises:
          ValueError: an unknown format.
          ConversationError: the file cannot be written.
        """
        return export.export(self, to)

    @classmethod
    def from_messages(
        cls,
        model: GemmaTransformer,
        tokenizer: Tokenizer,
        messages: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        *,
        evidence: bool = False,
        progress: Callable[[float, str], None] | None = None,
        **settings: Any,
    ) -> Self:
        """A conversation from messages in the common form, ready to go on.

        Args:
          model: from `gnb.load`.
          tokenizer: from `gnb.load`.
          messages: as `messages()` gives them, or the path of a JSON file with them; those of other
            programs, too, of which only roles and texts are read.  User and assistant speak by
            turns, the user first; a system message may lead.
          evidence: compute the evidence of the replies' tokens, by one pass over each.
          progress: called with a fraction and a sentence while that is done.
          **settings: further arguments of `ChatSession`; its `system` stands before the messages'.

        Raises:
          ConversationError: the file cannot be read, or has no such messages.
          ValueError: messages of another form.
          TextError: text that cannot be tokenized.
        """
        imported = imports.read_messages(messages)
        path = settings.pop("autosave", None)
        chat = cls(model, tokenizer, **{"system": imported.system, **settings})
        for turn in imported.tree:
            tokenizer.encode(turn.text)
        if evidence:
            computation = Recomputation(model, tokenizer, chat.template, chat.capture.top_k)
            computation.tree(imported.tree, progress=progress)
        chat.adopt(imported.tree)
        chat.autosave = path
        return chat
