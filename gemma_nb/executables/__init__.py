"""Compiled programs that are kept across processes, and found again without being traced.

JAX's compilation cache finds a program by what it was lowered to, so every process traces and
lowers it first: most of two seconds of Python before the first token of Gemma 3 270M.  Here it is
found by what it would be traced from: the source, the versions, the settings and the shapes.
"""

from gemma_nb.executables.files import folder
from gemma_nb.executables.kept import Kept, forget, shapes_of, tried_together
from gemma_nb.executables.settings import ours, pinned
from gemma_nb.executables.starts import expect, started

__all__ = [
    "Kept",
    "expect",
    "folder",
    "forget",
    "ours",
    "pinned",
    "shapes_of",
    "started",
    "tried_together",
]
