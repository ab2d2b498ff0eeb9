"""Errors of the command line, said in one line on stderr."""

from __future__ import annotations

import contextlib
import sys


class UsageError(Exception):
    """The command line asks for something that cannot be."""


def fail(error: Exception, code: int) -> int:
    """Say an error, and give the exit code."""
    with contextlib.suppress(OSError):  # nobody listens
        print("gemma-nb:", " ".join(str(error).split()), file=sys.stderr)
    return code
