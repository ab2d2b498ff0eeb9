"""Saving a conversation while it goes on: a kernel that dies loses at most its last second.

A thread observes the session twice a second, notes what is new or different, and appends it to the
journal beside the file (see `gemma_nb.chat.saving`): a few kilobytes, however long the conversation
is, and nothing that the reply has to wait for.  When the journal has grown as large as the file,
both are folded into a new file, so each byte is rewritten a few times at most.

Before it writes, it looks whether both files are as it left them (see
`gemma_nb.chat.saving.ownership`).  What was lost is written anew; where something else stands now,
that is left as it is, and the conversation is saved beside it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import warnings
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_nb.chat.readers import close_all
from gemma_nb.chat.saving import archive, journal, writer
from gemma_nb.chat.saving.fingerprint import Fingerprint
from gemma_nb.chat.saving.ownership import FileState, Stamp, file_state, free_beside, stamp_of
from gemma_nb.chat.saving.protocol import Partial, SavedSession, Settings
from gemma_nb.chat.saving.writer import Encoder
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.ending import python_ends
from gemma_nb.errors import ConversationError, ConversationWarning
from gemma_nb.text.template import Template

INTERVAL = 0.5  # seconds between two observations of the session
_FOLD_FROM = 1 << 18  # bytes of a journal that is worth folding
_RETRY_SECONDS = 10.0  # between attempts, where the disk takes nothing


class Autosave:
    """Saves one session to one file until it is closed, or the session or the process ends.

    Attributes:
      path: the file; another one than was asked for, once something else stands there.
      error: why the conversation is not being saved right now, or not where it was to be; None
        while all is well.
      notice: what happened to the file, where that was mended; None where nothing did.
    """

    def __init__(
        self,
        session: SavedSession,
        path: Path,
        conversation: str,
        previous: str | None = None,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        """Writes the whole conversation, and begins.

        Args:
          session: what to save; let go of when nobody else holds it.
          path: the file, which is replaced.
          conversation: see the format.
          previous: the generation that the file has now, if it is this conversation's.
          fingerprint: of the model that the evidence is of; None is the session's.

        Raises:
          ConversationError: the file cannot be written.
        """
        self.path = path
        self.error: Exception | None = None
        self.notice: Exception | None = None
        self._session = weakref.ref(session)
        self._seen = _state_of(session)
        self._fingerprint = fingerprint or Fingerprint.of(session.model, session.tokenizer)
        self._conversation = conversation
        self._generations = [] if previous is None else [previous]  # the last one last
        self._stamp: Stamp | None = None
        self._moved: ConversationError | None = None
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._process = os.getpid()
        self._retry_at = 0.0
        self._closed = self._replying = False
        self._continued = False  # whether another session has gone on with the file, and then
        self._behind = False  # whether that lacks something
        self._journal: journal.Writer | None = None
        # Turn -> whether its evidence is in the journal or the file, where, its size, and its CRC.
        self._places: dict[int, tuple[bool, int, int, int]] = {}
        self._size = 0
        self._begin()
        # Also where nobody closes it: the session is dropped, or the kernel ends in good order.
        self._finalizer = weakref.finalize(session, self._end)
        self._thread = threading.Thread(target=self._run, name="gemma_nb autosave", daemon=True)
        self._thread.start()

    @property
    def generation(self) -> str | None:
        """The generation of the file as it is now."""
        return self._generations[-1] if self._generations else None

    def flush(self) -> None:
        """Writes what is new or different; never raises, see `error`."""
        with self._lock:
            if self._closed or time.monotonic() < self._retry_at:
                return
            try:
                self._flush()
                self.error = self._moved
            except Exception as error:  # whatever it is: the next attempt may be luckier
                self._failed(error)

    def fold(self) -> None:
        """Brings the file itself up to date; what else stands there is replaced, as it is asked to.

        Raises:
          ConversationError: it cannot be written.
        """
        with self._lock:
            self._retry_at = 0.0
            try:
                partial = self._observe()
                if self._file_state() == "untouched":
                    self._append(partial)
                    self._fold()
                else:
                    self._begin()
                self._continued = self._behind = False
            except Exception as error:
                self._failed(error)
                raise ConversationError(str(error)) from error
            self.error = self._moved

    def close(self) -> None:
        """Writes what is left, folds it into the file, and ends; never raises, see `error`.

        What cannot be written there at last is written to the folder for temporary files.
        """
        self._ending.set()
        self._finalizer.detach()
        if os.getpid() != self._process:
            return  # a fork: the file is the parent's
        with self._lock:
            if self._closed:
                return
            self._retry_at = 0.0
            self.flush()
            self._finish()
            if self.error is not self._moved:
                self._rescue(self.error)
            self._let_go()
            self._closed = True

    # --- internals ------------------------------------------------------------------------------

    def _end(self) -> None:
        """`close`, where nobody is left to be told what went wrong but who reads the output."""
        told = self.error
        if python_ends():
            close_all()  # what is being made is saved, too
        self.close()
        if self.error is not told:
            warnings.warn(f"Autosave: {self.error}", ConversationWarning, stacklevel=1)

    def _finish(self) -> None:
        """Folds the journal into the file, and removes it."""
        # A reply that is being made stands in the journal only.
        if self._journal is None or self._replying or self._continued:
            return
        try:
            self._fold()
            self._journal.remove()
        except Exception as error:
            self._failed(error)

    def _rescue(self, error: Exception | None) -> None:
        """Writes everything where there may be room, since it will soon be nowhere."""
        try:
            self._go_to(free_beside(Path(tempfile.gettempdir(), self.path.name)))
            self._append(self._observe())
            self._finish()
        except Exception:
            return
        self.error = ConversationError(f"{error}.  At the end it was saved to {self.path} instead")

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
        partial = self._observe()
        state = self._file_state()
        self._continued = state == "continued"
        if self._continued:
            self._behind = self._behind or bool(self._encoder.changes(*self._seen, partial)[0])
            if not self._behind:
                return
            self._go_beside("another session goes on with it")
        elif state == "taken":
            self._go_beside("something else stands there now")
        elif state == "lost":
            told = self.error is not None
            self._begin()
            if not told:
                self.notice = ConversationError(
                    f"{self.path}, or the journal beside it, was deleted or changed by somebody "
                    "else; the whole conversation was written there again"
                )
        self._append(partial)

    def _file_state(self) -> FileState:
        files = (self.path, self._stamp, self._journal)
        return file_state(*files, self._generations, self._encoder.turns)

    def _append(self, partial: Partial | None) -> None:
        """Adds to the journal what is new or different, and folds it where it has grown."""
        assert self._journal is not None
        changes, blobs = self._encoder.changes(*self._seen, partial)
        if changes:
            places = self._journal.append(changes, blobs)
            for name, place in places.items():
                if name != "partial":
                    blob = blobs[name]
                    self._places[int(name)] = (True, place, len(blob), zlib.crc32(blob))
        if partial is None and self._journal.size > max(_FOLD_FROM, self._size):
            self._fold()

    def _go_beside(self, why: str) -> None:
        """Saves to another file of the same folder from now on, and leaves this one as it is."""
        before, beside = self.path, self._journal
        self._go_to(free_beside(before))
        if beside is not None:
            beside.remove()  # all of it is in the new file
        self._continued = self._behind = False
        self._moved = ConversationError(
            f"{before} is no longer this session's: {why}.  It is left as it is, and this "
            f"conversation is saved to {self.path} from now on"
        )

    def _go_to(self, path: Path) -> None:
        """Writes everything to another file."""
        before = self.path, self._stamp, self._journal
        self.path, self._stamp, self._journal = path, None, None
        try:
            self._begin()
        except BaseException:
            self.path, self._stamp, self._journal = before
            raise

    def _observe(self) -> Partial | None:
        """Notes the session's state, and returns the reply that it is making."""
        session = self._session()
        partial = None
        if session is not None:
            self._seen, partial = _state_of(session), _partial_of(session)
        self._replying = partial is not None
        return partial

    def _begin(self) -> None:
        """Writes everything from memory, and an empty journal, whatever stands there."""
        self._encoder = Encoder()
        changes, blobs = self._encoder.changes(*self._seen)
        self._stamp = stamp_of(self.path)
        self._write(changes, ((int(id_), blob) for id_, blob in blobs.items()))

    def _fold(self) -> None:
        """Writes everything from the two files, and an empty journal."""
        try:
            self._write(self._encoder.structure(), self._evidence())
        except _OtherBytes:
            self._begin()

    def _evidence(self) -> Iterator[tuple[int, bytes]]:
        """The evidence of all turns, from where it is now."""
        assert self._journal is not None
        with open(self.path, "rb") as file:
            for id_, (in_journal, place, size, crc) in self._places.items():
                if in_journal:
                    blob = self._journal.read(place, size)
                else:
                    file.seek(place)
                    blob = file.read(size)
                if zlib.crc32(blob) != crc:
                    raise _OtherBytes
                yield id_, blob

    def _write(self, structure: dict[str, Any], evidence: Iterator[tuple[int, bytes]]) -> None:
        generation = writer.new_id()
        head = writer.header(self._fingerprint, self._conversation, generation, self.generation)
        empty: dict[str, Any] = {"turns": {}, "strings": [], "lists": []}
        crcs: dict[int, int] = {}

        def noted() -> Iterator[tuple[int, bytes]]:
            for id_, blob in evidence:
                crcs[id_] = zlib.crc32(blob)
                yield id_, blob

        whole = {**head, **empty, **structure}
        places = archive.write(self.path, whole, noted(), self._check_untouched)
        self._stamp = stamp_of(self.path)
        self._generations.append(generation)
        self._places = {id_: (False, *place, crcs[id_]) for id_, place in places.items()}
        self._size = self.path.stat().st_size
        self._let_go()
        self._journal = journal.Writer(journal.path_of(self.path), generation)

    def _check_untouched(self) -> None:
        """Refuses to replace what came while the new file was being written."""
        if stamp_of(self.path) not in (self._stamp, None):
            raise ConversationError(f"{self.path} was written to by somebody else just now")


class _OtherBytes(Exception):
    """Raised when what is read is not what was written."""


def _state_of(session: SavedSession) -> tuple[ConversationTree, Settings, Template]:
    return session.tree, Settings.of(session), session.template


def _partial_of(session: SavedSession) -> Partial | None:
    """The reply being made; by the time that it is looked at, it may have ended."""
    making = session.making
    return None if making is None else Partial(*making)
