"""The file of a session: saved to by hand or while it goes on, and opened under a model."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_nb import settings
from gemma_nb.cache import expanded
from gemma_nb.chat.interrupts import between_steps
from gemma_nb.chat.saving import archive, export, journal, reader, writer
from gemma_nb.chat.saving.autosave import Autosave
from gemma_nb.chat.saving.fingerprint import Fingerprint
from gemma_nb.chat.saving.interventions import warn_of_unresolved
from gemma_nb.chat.saving.protocol import SavedSession
from gemma_nb.chat.saving.reader import Saved
from gemma_nb.chat.user_warnings import warn_user
from gemma_nb.errors import ConversationError, ConversationWarning, ModelMismatchError
from gemma_nb.interventions import Intervention
from gemma_nb.model import GemmaTransformer
from gemma_nb.text.template import Template

PathLike = str | os.PathLike[str]


class SessionFile:
    """Saves one session, to the file that it is given each time or to one while it goes on."""

    def __init__(self, session: SavedSession) -> None:
        self._session = weakref.ref(session)
        self._conversation = writer.new_id()  # its name in files, the same in every copy
        # Of the model that its evidence is of, where that is not the session's own.
        self._fingerprint: Fingerprint | None = None
        self._autosave: Autosave | None = None
        self._told: list[Exception] = []
        # What this session wrote or read, by file: it may be replaced.
        self._known: dict[Path, str | None] = {}

    @property
    def path(self) -> Path | None:
        """The file that the session is being saved to."""
        return None if self._autosave is None else self._autosave.path

    def opened(self, saved: Saved, now: Fingerprint, *, recomputed: bool) -> None:
        """Notes that the session is what a file holds.

        Args:
          saved: what was read.
          now: of the session's model and tokenizer.
          recomputed: whether the evidence is theirs, rather than as it was.
        """
        self._conversation = saved.conversation
        self._known[saved.path] = saved.generation
        if not recomputed and saved.fingerprint.differences(now):
            self._fingerprint = saved.fingerprint.beside(now)

    def set_aside(self, saved: Saved) -> Path:
        """Sets a journal aside of which something was left out; the path to go on saving to."""
        if saved.left_out:
            journal.set_aside(saved.path)
        return saved.path

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
        target = absolute(path)
        with between_steps():
            if self._autosave is not None and target == self._autosave.path:
                self._autosave.fold()
            else:
                session = self._saved_session()
                written = writer.save(session, target, self._conversation, self._fingerprint)
                self._known[target] = written
        return target

    def messages(self) -> list[dict[str, str]]:
        """The active branch in the common form, `[{"role": "user", "content": "Hello"}, ...]`.

        Roles are "system" (first, where the system text is not the template's own), "user" and
        "assistant".
        """
        return export.messages(self._saved_session())

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
        return export.export(self._saved_session(), to)

    def autosave(self, path: PathLike | None) -> None:
        """Saves the session to a file from now on, or no longer; see `ChatSession.autosave`."""
        if path is not None:
            settings.path("autosave", path, "the path of a file, or None")
        target = None if path is None else absolute(path)
        if target is not None and target == self.path:
            return
        if target is not None and os.path.lexists(archive.real(target)):
            self._check_own(target)
        elif target is not None:
            journal.set_aside(target)  # of a file that is not there: it may come back
        with between_steps():
            before, self._autosave = self._autosave, None
            if before is not None:
                before.close()
                self._known[before.path] = before.generation
                self._tell(before)
            if target is not None:
                known = self._known.get(target)
                self._autosave = Autosave(
                    *(self._saved_session(), target, self._conversation), known, self._fingerprint
                )

    def warn(self) -> None:
        """Warns the user, once, if the conversation is not being saved."""
        if self._autosave is not None:
            self._tell(self._autosave)

    def _saved_session(self) -> SavedSession:
        """The session, which holds this file and so is there."""
        session = self._session()
        assert session is not None
        return session

    def _tell(self, autosave: Autosave) -> None:
        for said in (autosave.notice, autosave.error):
            if said is not None and said not in self._told:
                self._told.append(said)
                warn_user(f"Autosave: {said}", ConversationWarning)

    def _check_own(self, path: Path) -> None:
        """Refuses to replace a file that may hold something else."""
        try:
            structure, _ = archive.read(path)
            known = self._known.get(path)
            own = known is not None and structure.get("generation") == known
        except ConversationError:
            own = False
        if not own:
            raise ConversationError(
                f"{path} exists already, and this conversation did not come from it: it is not "
                "replaced.  Choose another path, or continue what is in it with "
                "gnb.ChatSession.load(path, model, tokenizer, autosave=True)"
            )


def absolute(path: PathLike) -> Path:
    """A path that stays the same when the working directory changes."""
    return expanded(path).absolute()


def read_for(
    model: GemmaTransformer,
    now: Fingerprint,
    path: PathLike,
    *,
    recompute: bool | None,
    interventions: Sequence[type[Intervention]],
) -> Saved:
    """The conversation of a file, if it can go on under a model; see `ChatSession.load`.

    Args:
      model: that is to go on with it.
      now: of that model and its tokenizer.
      path: the file.
      recompute: what is to become of evidence that is another model's.
      interventions: classes of the user's own.

    Raises:
      ConversationError: there is no such file, it is damaged, or of a later version.
      ModelMismatchError: the evidence is another model's, and `recompute` does not say what then.
    """
    saved = reader.read(absolute(path), interventions)
    warn_of_unresolved(saved.tree)
    same_tokenizer = saved.fingerprint.tokenizer == now.tokenizer
    if recompute is None or (not recompute and not same_tokenizer):
        _check_model(saved, now)
    if same_tokenizer:
        _check_ids(saved, model.config.num_embed)
    return saved


def arguments(
    saved: Saved, model: GemmaTransformer, template: str | Template | None
) -> dict[str, Any]:
    """Arguments of the session that goes on with a file, as far as a model allows.

    Raises:
      ConversationError: no file can hold the template, and none is given.
    """
    if template is None and isinstance(saved.template, str):
        raise ConversationError(
            f"{saved.path} was written with a template of its own, {saved.template}, which no file "
            "can hold: give it as template=..."
        )
    config, held = model.config, saved.settings
    fitting = dataclasses.replace(
        held,
        cache_length=min(held.cache_length, config.max_context),
        capture=held.capture.fitting(config.num_layers),
    )
    return {**fitting.arguments(), "template": saved.template if template is None else template}


def _check_ids(saved: Saved, count: int) -> None:
    """Refuses token ids that there are none of: the model would compute something of them."""
    for turn in saved.tree:
        ids = [*(turn.ids or ()), *turn.tokens.token_id.tolist()]
        if ids and not 0 <= min(ids) <= max(ids) < count:
            raise archive.damaged(
                saved.path, f"turn {turn.id} has token ids outside of 0 to {count - 1}"
            )


def _check_model(saved: Saved, now: Fingerprint) -> None:
    differences = saved.fingerprint.differences(now)
    if not differences:
        return
    name = saved.fingerprint.name
    ways = ["with recompute=True to compute it anew with this model (texts and branches stay)"]
    if saved.fingerprint.tokenizer == now.tokenizer:
        ways.append("with recompute=False to keep it as it was")
    ways.append(f"with the model it is of{f' (gnb.load({name!r}))' if name else ''}")
    raise ModelMismatchError(
        f"{saved.path} was held with {saved.fingerprint.title}; this is {now.title}: "
        f"{', '.join(differences)}.  The evidence of its tokens is not this model's.  Load it "
        f"{', '.join(ways[:-1])}, or {ways[-1]}"
    )
