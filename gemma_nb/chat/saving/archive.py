"""The zip file of a saved conversation: written as a whole or not at all, read with suspicion.

Members are stored without compression, so none can be larger than the file: what a file declares
is known to be true before memory is given to it.  Nothing is ever extracted to the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gemma_nb.checkpoints import kinds
from gemma_nb.errors import ConversationError

STRUCTURE = "conversation.json"
_EVIDENCE = re.compile(r"evidence/(0|[1-9]\d{0,18})\.safetensors")
_STALE_SECONDS = 3600

# What zipfile, json and the codec raise over bytes that are not what was written.
DAMAGE = (
    zipfile.BadZipFile,
    ArithmeticError,  # a number that is out of range
    AttributeError,  # not an object where one is expected
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,  # encrypted, an unknown method, or JSON nested without end
    TypeError,
    ValueError,
)


def write(
    path: Path,
    structure: dict[str, Any],
    evidence: Iterable[tuple[int, bytes]],
    check: Callable[[], None] | None = None,
) -> dict[int, tuple[int, int]]:
    """Replaces the file at `path`; it is the old one or the new one at any moment.

    Args:
      path: what to write.
      structure: the content of conversation.json.
      evidence: (id of a turn, safetensors bytes) pairs.
      check: see `replacing`.

    Returns:
      Where the evidence of each turn begins in the file, and its size.

    Raises:
      ConversationError: it cannot be written.
    """
    text = json.dumps(structure, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate, which a JSON file of somebody else may hold, is written as an escape.
    raw = text.encode("utf-8", "backslashreplace")
    now = time.localtime()[:6]
    places = {}
    with (
        replacing(path, check) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.writestr(zipfile.ZipInfo(STRUCTURE, now), raw)
        for turn_id, data in evidence:
            archive.writestr(zipfile.ZipInfo(f"evidence/{turn_id}.safetensors", now), data)
            places[turn_id] = (file.tell() - len(data), len(data))
    return places


def read(path: Path) -> tuple[dict[str, Any], dict[int, bytes]]:
    """The content of conversation.json, and the evidence by the ids of its turns.

    Raises:
      ConversationError: there is no such file, or it is not what `write` wrote.
    """
    try:
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            members = _checked(archive.infolist(), os.fstat(file.fileno()).st_size)
            structure = json.loads(archive.read(STRUCTURE))
            if not isinstance(structure, dict):
                raise ValueError(f"{STRUCTURE} is not an object")
            return structure, {id_: archive.read(name) for name, id_ in members.items()}
    except OSError as error:
        raise unreadable(path, error) from error
    except DAMAGE as error:
        raise damaged(path, error) from error


def _checked(members: list[zipfile.ZipInfo], size: int) -> dict[str, int]:
    """Evidence's names with the ids of their turns, once every declared size is possible."""
    names = [member.filename for member in members]
    if STRUCTURE not in names:
        raise ValueError(f"it has no {STRUCTURE}")
    if len(set(names)) < len(names):
        raise ValueError("it has two members of the same name")
    for member in members:
        if member.filename != STRUCTURE and not _EVIDENCE.fullmatch(member.filename):
            raise ValueError(f"it has a member {member.filename!r}, which no conversation has")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(
                f"{member.filename} is compressed, which no conversation's members are"
            )
    declared = sum(member.file_size for member in members)
    if declared > size:
        raise ValueError(f"its members declare {declared:,} bytes, the file has {size:,}")
    matches = (_EVIDENCE.fullmatch(name) for name in names)
    return {match[0]: int(match[1]) for match in matches if match}


# --- files ----------------------------------------------------------------------------------------


def opened(path: Path) -> BinaryIO:
    """A file to read.

    Raises:
      OSError: it cannot be opened, or is something else: a pipe would be waited for without an end.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is no regular file")
    return open(path, "rb")


def real(path: Path) -> Path:
    """The file that a link leads to, also where there is none yet; else the same."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def replacing(path: Path, check: Callable[[], None] | None = None) -> Iterator[BinaryIO]:
    """A file that becomes `path`, on the disk, when the block ends well; else nothing changes.

    Where `path` is a link, what it leads to is replaced, and the link stays.

    Args:
      path: what to replace.
      check: called before it is replaced; what it raises leaves it as it is.

    Raises:
      ConversationError: it cannot be written.
    """
    path = real(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        _remove_leftovers(path)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if check is not None:
                check()
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise ConversationError(
            f"{path} cannot be written: {error.strerror or error}.  What was there before is "
            "unchanged, and the conversation is still in memory: save it to another path with "
            "chat.save(path)"
        ) from error


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the system can do that."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Deletes temporary files for `path` that a process left behind when it was killed."""
    prefix, suffix = f".{path.name}.", ".tmp"
    for file in path.parent.iterdir():
        ours = file.name.startswith(prefix) and file.name.endswith(suffix)
        if ours and len(file.name) == len(prefix) + 12 + len(suffix):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                    file.unlink()


def unreadable(path: Path, error: OSError) -> ConversationError:
    """The error for a file that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return ConversationError(
            f"there is no file {path}; expected a conversation that chat.save(path) wrote"
        )
    return ConversationError(f"{path} cannot be read: {error.strerror or error}")


def damaged(path: Path, problem: object) -> ConversationError:
    """The error for a file that is not what was written."""
    problem = f"nothing is at {problem} in it" if isinstance(problem, LookupError) else problem
    problem = kinds.in_place_of(path) or problem
    inside = (
        f"  (The file is a zip; if you trust it, {STRUCTURE} in it has the text of every turn.)"
        if zipfile.is_zipfile(path)
        else ""
    )
    return ConversationError(
        f"{path} is not a whole conversation: {problem}.  Expected a file that chat.save(path) "
        f"wrote, unchanged: take another copy of it.{inside}"
    )
