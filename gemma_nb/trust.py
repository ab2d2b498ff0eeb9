"""Whether others than this user can have changed what lies in a folder: code from there is theirs.

Compiled programs are code, and what describes them is unpickled.  They are read only where this
user, or root, alone can have put them: the folder and its files belong to one of the two, nobody
else can write to them, and nobody else can put another folder in their place.
"""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

_MAX_LINKS = 40  # as Linux follows them
_OTHERS = stat.S_IWGRP | stat.S_IWOTH

_warned: set[Path] = set()


class UntrustedError(OSError):
    """A file that others can have written."""


def distrust(folder: Path, own: Path) -> str:
    """Why what lies in a folder is not to be run; "" where nobody else can have put it there.

    On Windows it is always "": there a folder below a user's own is that user's alone, and who may
    write to another is not told by its mode.

    Args:
      folder: it may be missing, or a link.
      own: the folder above it, or itself, from which on nobody else may write at all.  What is
        above that only has to keep others from moving it, as `/tmp` does.
    """
    if not hasattr(os, "geteuid"):
        return ""
    try:
        top = os.path.realpath(own)
        steps = list(_walk(folder.absolute()))
        for path, about in steps:
            inside = str(path) == top or str(path).startswith(top + os.sep)
            strict = inside or path is steps[-1][0]
            if reason := _objection(path, about, strict=strict):
                return reason
    except OSError as error:
        return f"{folder} cannot be looked into: {error}"
    return ""


def warn_of(folder: Path, own: Path) -> bool:
    """Whether a folder is not to be trusted; says so, once in a process and for all of `own`."""
    reason = distrust(folder, own)
    if reason and own not in _warned:
        _warned.add(own)
        warnings.warn(
            f"the compiled programs kept in {own} are not used: {reason}, and a program is code; "
            f"remove the folder, and take that right away (chmod go-w), or set the environment "
            "variable GEMMA_NB_CACHE to a folder of your own",
            RuntimeWarning,
            stacklevel=4,
        )
    return bool(reason)


def read(file: Path) -> bytes:
    """The content of a file that nobody else can have written.

    Raises:
      UntrustedError: somebody can have.
      OSError: it cannot be read.
    """
    before = file.lstat()
    if not stat.S_ISREG(before.st_mode):  # a pipe would be waited for
        raise UntrustedError(errno.EPERM, "is a link or no file", str(file))
    with open(file, "rb") as opened:
        about = os.fstat(opened.fileno())
        if hasattr(os, "geteuid"):
            if (about.st_dev, about.st_ino) != (before.st_dev, before.st_ino):
                raise UntrustedError(errno.EPERM, "changed while it was opened", str(file))
            if reason := _objection(file, about, strict=True):
                raise UntrustedError(errno.EPERM, reason, str(file))
        return opened.read()


def _walk(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every folder and link that is there on the way to an absolute path, from the top, and itself.

    Raises:
      OSError: one cannot be looked into, or links lead in a circle.
    """
    at, left, links = Path(path.anchor), list(reversed(path.parts[1:])), 0
    yield at, at.lstat()
    while left:
        part = left.pop()
        if part == "..":
            at = at.parent
            continue
        step = at / part
        try:
            about = step.lstat()
        except FileNotFoundError:  # what is not there yet will be ours
            return
        yield step, about
        if not stat.S_ISLNK(about.st_mode):
            at = step
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(step))
        at = Path(target.anchor) if target.is_absolute() else at
        left += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def _objection(path: Path, about: os.stat_result, *, strict: bool) -> str:
    """What stands against a file, a folder or a link; "" if nothing does."""
    if about.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to {_user(about.st_uid)}"
    if stat.S_ISLNK(about.st_mode) or not about.st_mode & _OTHERS:
        return ""
    if not strict:
        if about.st_mode & stat.S_ISVTX:  # others can add files, but move none
            return ""
        if not about.st_mode & stat.S_IWOTH and _is_group_of_one(about.st_gid):
            return ""
    return f"others can write to {path}"


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _is_group_of_one(gid: int) -> bool:
    """Whether a group has nobody in it but this user, and root.

    Many systems give every user such a group, and home folders that it can write to.
    """
    import grp
    import pwd

    me = os.geteuid()
    users = {user.pw_name: user for user in pwd.getpwall()}
    known = any(user.pw_uid == me for user in users.values())  # else the list is not whole
    members = {name for name, user in users.items() if user.pw_gid == gid}
    try:
        members.update(grp.getgrgid(gid).gr_mem)
    except KeyError:
        return False
    return known and all(name in users and users[name].pw_uid in (0, me) for name in members)
