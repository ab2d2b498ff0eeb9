"""What a session does to be kept: `save`, `load`, `autosave`."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gemma_nb import settings
from gemma_nb.cache import expanded
from gemma_nb.chat import altered, archive, journal, restore, store
from gemma_nb.chat.autosave import Autosave
from gemma_nb.chat.identity import Identity
from gemma_nb.chat.interrupts import between_steps
from gemma_nb.chat.recompute import Recomputation
from gemma_nb.chat.restore import Saved
from gemma_nb.errors import ConversationError, ConversationWarning, ModelMismatchError
from gemma_nb.interventions import Intervention
from gemma_nb.model import GemmaTransformer
from gemma_nb.text.template import Template
from gemma_nb.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemma_nb.chat.conversation import Conversation
    from gemma_nb.chat.kept import KeptConversation

PathLike = str | os.PathLike[str]
Progress = Callable[[float, str], None]
Kept = TypeVar("Kept", bound="KeptConversation")


class Keeper:
    """Where one session is kept.

    Attributes:
      conversation: its name in files, the same in every copy.
      identity: of the model that its evidence is of, where that is not the session's own.
    """

    def __init__(self) -> None:
        self.conversation = store.new_id()
        self.identity: Identity | None = None
        self._autosave: Autosave | None = None
        self._told: list[Exception] = []
        # What this session wrote or read, by file: it may be replaced.
        self._known: dict[Path, str | None] = {}

    @property
    def path(self) -> Path | None:
        """The file that the session is being saved to."""
        return None if self._autosave is None else self._autosave.path

    def knows(self, saved: Saved) -> None:
        """Notes that the session is what a file holds."""
        self.conversation = saved.conversation
        self._known[saved.path] = saved.generation

    def save(self, chat: Conversation, path: PathLike) -> Path:
        """See `ChatSession.save`."""
        target = absolute(path)
        with between_steps():
            if self._autosave is not None and target == self._autosave.path:
                self._autosave.fold()
            else:
                self._known[target] = store.save(chat, target, self.conversation, self.identity)
        return target

    def autosave(self, chat: Conversation, path: PathLike | None) -> None:
        """See `ChatSession.autosave`."""
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
                self._autosave = Autosave(
                    chat, target, self.conversation, self._known.get(target), self.identity
                )

    def warn(self) -> None:
        """Says so, once, if the conversation is not being saved."""
        if self._autosave is not None:
            self._tell(self._autosave)

    def _tell(self, autosave: Autosave) -> None:
        for said in (autosave.notice, autosave.error):
            if said is not None and said not in self._told:
                self._told.append(said)
                warnings.warn(f"Autosave: {said}", ConversationWarning, stacklevel=4)

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


def load(
    cls: type[Kept],
    path: PathLike,
    model: GemmaTransformer,
    tokenizer: Tokenizer,
    *,
    recompute: bool | None,
    template: str | Template | None,
    interventions: Sequence[type[Intervention]],
    autosave: bool,
    progress: Progress | None,
) -> Kept:
    """See `ChatSession.load`."""
    saved = restore.read(absolute(path), interventions)
    altered.warn_of_unread(saved.tree)
    now = Identity.of(model, tokenizer)
    if recompute is None or (not recompute and saved.identity.tokenizer != now.tokenizer):
        _check_model(saved, now)
    if saved.identity.tokenizer == now.tokenizer:
        _check_ids(saved, model.config.num_embed)
    length = min(saved.settings.cache_length, model.config.max_context)
    capture = saved.settings.capture.fitting(model.config.num_layers)
    held = dataclasses.replace(saved.settings, cache_length=length, capture=capture)
    chat = cls(model, tokenizer, template=_template(saved, template), **held.fields())
    if recompute:
        respell = saved.identity.tokenizer != now.tokenizer
        computation = Recomputation(model, tokenizer, chat.template, chat.capture.top_k)
        computation.tree(saved.tree, respell=respell, progress=progress)
    chat.adopt(saved.tree)
    keeper = chat.keeper
    keeper.knows(saved)
    if not recompute and saved.identity.differences(now):
        keeper.identity = saved.identity.beside(now)
    if autosave:
        if saved.left_out:
            journal.set_aside(saved.path)
        chat.autosave = saved.path
    return chat


def _template(saved: Saved, template: str | Template | None) -> str | Template:
    if template is not None:
        return template
    if isinstance(saved.template, str):
        raise ConversationError(
            f"{saved.path} was written with a template of its own, {saved.template}, which no file "
            "can hold: give it as template=..."
        )
    return saved.template


def _check_ids(saved: Saved, count: int) -> None:
    """Refuses token ids that there are none of: the model would compute something of them."""
    for turn in saved.tree:
        ids = [*(turn.ids or ()), *(record.token_id for record in turn.tokens)]
        if ids and not 0 <= min(ids) <= max(ids) < count:
            raise archive.damaged(
                saved.path, f"turn {turn.id} has token ids outside of 0 to {count - 1}"
            )


def _check_model(saved: Saved, now: Identity) -> None:
    differences = saved.identity.differences(now)
    if not differences:
        return
    name = saved.identity.name
    ways = ["with recompute=True to compute it anew with this model (texts and branches stay)"]
    if saved.identity.tokenizer == now.tokenizer:
        ways.append("with recompute=False to keep it as it was")
    ways.append(f"with the model it is of{f' (gnb.load({name!r}))' if name else ''}")
    raise ModelMismatchError(
        f"{saved.path} was held with {saved.identity.title}; this is {now.title}: "
        f"{', '.join(differences)}.  The evidence of its tokens is not this model's.  Load it "
        f"{', '.join(ways[:-1])}, or {ways[-1]}"
    )
