"""Ownership of the place where a session saves: others may write there, too.

Files are restored from a backup, checked out, synchronised, moved, edited and deleted, and two
sessions may be given one path.  What somebody else wrote is never replaced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from gemma_nb.chat.saving import archive, journal
from gemma_nb.errors import ConversationError

# untouched: the two files are as they were left.
# lost: they are not, and nothing that stands there is anybody else's.
# continued: another session has read all of it and goes on there.
# taken: something else stands there.
FileState = Literal["untouched", "lost", "continued", "taken"]
Stamp = tuple[int, int, int, int]


def stamp_of(path: Path) -> Stamp | None:
    """A stamp that changes when a file is replaced or written to; None where there is none."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return None


def file_state(
    path: Path,
    stamp: Stamp | None,
    beside: journal.Writer | None,
    generations: Sequence[str],
    turns: Collection[int],
) -> FileState:
    """State of what a session wrote, as it is found now.

    Args:
      path: the conversation's file.
      stamp: of the file when it was written; None where it was not yet.
      beside: its journal; None where it was let go of.
      generations: those that the session has written, the last one last.
      turns: ids of those that it has written.
    """
    same = stamp is not None and stamp_of(path) == stamp
    if same and beside is not None and beside.still_there():
        return "untouched"
    if not same and os.path.lexists(path):
        try:
            structure, _ = archive.read(path)
        except ConversationError:
            return "taken"
        last = generations[-1:]
        if structure.get("generation") not in last:
            held = structure.get("turns")
            whole = isinstance(held, dict) and {str(id_) for id_ in turns} <= held.keys()
            return "continued" if whole and structure.get("previous") in last else "taken"
    if beside is not None and beside.is_where_it_was():
        return "lost"  # written to, or cut off
    found = journal.path_of(path)
    if not os.path.lexists(found) or journal.generation_of(found) in generations:
        return "lost"
    return "taken"


def free_beside(path: Path) -> Path:
    """A name like that of `path` which nothing has, nor a journal of that name."""
    number = 2
    while True:
        other = path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not (os.path.lexists(other) or os.path.lexists(journal.path_of(other))):
            return other
        number += 1
