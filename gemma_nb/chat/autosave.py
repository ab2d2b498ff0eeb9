"""Saving a conversation while it goes on: a kernel that dies loses at most its last second.

A thread looks at the session twice a second, notes what is new or different, and appends it to the
journal beside the file (see `gemma_nb.chat.store`): a few kilobytes, however long the conversation
is, and nothing that the reply has to wait for.  When the journal has grown as large as the file,
both are folded into a new file, so each byte is rewritten a few times at most.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_nb.chat import archive, journal, store
from gemma_nb.chat.identity import Identity
from gemma_nb.chat.store import Encoder, Partial, Settings
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.errors import ConversationError
from gemma_nb.text.template import Template

if TYPE_CHECKING:
    from gemma_nb.chat.conversation import Conversation

INTERVAL = 0.5  # seconds between two looks at the session
_FOLD_FROM = 1 << 18  # bytes of a journal that is worth folding
_RETRY_SECONDS = 10.0  # between attempts, where the disk takes nothing


class Autosave:
    """Saves one session to one file until it is closed, or the session or the process ends.

    Attributes:
      path: the file.
      error: why the conversation is not being saved right now; None while all is well.
    """

    def __init__(
        self,
        chat: Conversation,
        path: Path,
        conversation: str,
        previous: str | None = None,
        identity: Identity | None = None,
    ) -> None:
        """Writes the whole conversation, and begins.

        Args:
          chat: the session.
          path: the file, which is replaced.
          conversation: see the format.
          previous: the generation that the file has now, if it is this conversation's.
          identity: of the model that the evidence is of; None is the session's.

        Raises:
          ConversationError: the file cannot be written.
        """
        self.path = path
        self.error: Exception | None = None
        self._chat = weakref.ref(chat)
        self._seen = _state_of(chat)
        self._identity = identity or Identity.of(chat.model, chat.tokenizer)
        self._conversation = conversation
        self._generation = previous
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._process = os.getpid()
        self._retry_at = 0.0
        self._lost = self._replying = False  # whether the file is somebody else's now
        self._journal: journal.Writer | None = None
        # Turn -> whether its evidence is in the journal or the file, where, and its size.
        self._places: dict[int, tuple[bool, int, int]] = {}
        self._size = 0
        self._begin()
        # Also where nobody closes it: the session is dropped, or the kernel ends in good order.
        self._finalizer = weakref.finalize(chat, self.close)
        self._thread = threading.Thread(target=self._run, name="gemma_nb autosave", daemon=True)
        self._thread.start()

    @property
    def generation(self) -> str | None:
        """Of the file as it is now."""
        return self._generation

    def flush(self) -> None:
        """Writes what is new or different; never raises, see `error`."""
        with self._lock:
            if self._lost or time.monotonic() < self._retry_at:
                return
            try:
                self._flush()
                self.error = None
            except Exception as error:  # whatever it is: the next look may be luckier
                self._failed(error)

    def fold(self) -> None:
        """Brings the file itself up to date.

        Raises:
          ConversationError: it cannot be written.
        """
        with self._lock:
            self._retry_at = 0.0
            self.flush()
            if self.error is None:
                try:
                    self._fold()
                except (OSError, ConversationError) as error:
                    self._failed(error)
            if self.error is not None:
                raise ConversationError(str(self.error)) from self.error

    def close(self) -> None:
        """Writes what is left, folds it into the file, and ends; never raises, see `error`."""
        self._ending.set()
        self._finalizer.detach()
        if os.getpid() != self._process:
            return  # a fork: the file is the parent's
        with self._lock:
            self._retry_at = 0.0
            self.flush()
            if self._journal is None:
                return
            try:
                # A reply that is being made stands in the journal only.
                if self.error is None and not self._replying:
                    self._fold()
                    self._journal.close()
                    journal.remove(self.path)
            except (OSError, ConversationError) as error:
                self.error = error
            self._let_go()
            self._lost = True

    # --- inside ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ending.wait(INTERVAL):
            self.flush()

    def _failed(self, error: Exception) -> None:
        """Notes why, and begins anew later: what the encoder takes for written may not be."""
        self.error = error
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        self._let_go()

    def _let_go(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._journal = None

    def _flush(self) -> None:
        partial = self._look()
        if self._journal is None:
            self._begin()
        assert self._journal is not None
        if not self._journal.still_there():
            self._lost = True
            raise ConversationError(
                f"{journal.path_of(self.path)} was moved, deleted or taken over by another "
                "session, so this conversation is no longer saved there.  It is still in memory: "
                "set chat.autosave to another path"
            )
        changes, blobs = self._encoder.changes(*self._seen, partial)
        if changes:
            places = self._journal.append(changes, blobs)
            for name, place in places.items():
                if name != "partial":
                    self._places[int(name)] = (True, place, len(blobs[name]))
        if partial is None and self._journal.size > max(_FOLD_FROM, self._size):
            self._fold()

    def _look(self) -> Partial | None:
        """Notes the session's state, and returns the reply that it is making."""
        chat = self._chat()
        partial = None
        if chat is not None:
            self._seen, partial = _state_of(chat), _partial_of(chat)
        self._replying = partial is not None
        return partial

    def _begin(self) -> None:
        """Writes everything from memory, and an empty journal."""
        self._encoder = Encoder()
        changes, blobs = self._encoder.changes(*self._seen)
        self._write(changes, ((int(id_), blob) for id_, blob in blobs.items()))

    def _fold(self) -> None:
        """Writes everything from the two files, and an empty journal."""
        self._write(self._encoder.structure(), self._evidence())

    def _evidence(self) -> Iterator[tuple[int, bytes]]:
        """The evidence of all turns, from where it is now."""
        assert self._journal is not None
        with open(self.path, "rb") as file:
            for id_, (in_journal, place, size) in self._places.items():
                if in_journal:
                    yield id_, self._journal.read(place, size)
                else:
                    file.seek(place)
                    yield id_, file.read(size)

    def _write(self, structure: dict[str, Any], evidence: Iterator[tuple[int, bytes]]) -> None:
        generation = store.new_id()
        head = store.header(self._identity, self._conversation, generation, self._generation)
        empty: dict[str, Any] = {"turns": {}, "strings": [], "lists": []}
        places = archive.write(self.path, {**head, **empty, **structure}, evidence)
        self._generation = generation
        self._places = {id_: (False, *place) for id_, place in places.items()}
        self._size = self.path.stat().st_size
        self._let_go()
        self._journal = journal.Writer(journal.path_of(self.path), generation)


def _state_of(chat: Conversation) -> tuple[ConversationTree, Settings, Template]:
    return chat.tree, Settings.of(chat), chat.template


def _partial_of(chat: Conversation) -> Partial | None:
    """The reply being made; by the time that it is looked at, it may have ended."""
    making = chat.making
    return None if making is None else Partial(*making)
