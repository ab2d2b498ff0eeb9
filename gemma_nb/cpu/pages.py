"""Where the pages of an array lie in memory.

A step reads all weights from end to end, and in pages of 4 KiB the processor spends part of the
time on looking up where the next one lies.  To have pages of 2 MiB is a matter of advice, to Linux;
a kernel that has none free uses small ones.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import jax
import numpy as np

_HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on arm64 with 4 KiB pages
# A cache line: JAX uses memory that begins at one as it is, and copies other memory.
_LINE = 64
# From <linux/mman.h>; Python's mmap module has no name for the second.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def adjoining(arrays: list[jax.Array]) -> list[jax.Array]:
    """The same arrays, copied one behind the other, so that huge pages can hold small ones too.

    Args:
      arrays: on one device.  The list is emptied as they are copied, so that what nobody else holds
        is freed, and hardly more memory is needed than before; where they are not copied, it stays.
    """
    sizes = [-(-array.nbytes // _LINE) * _LINE for array in arrays]
    if not arrays or not _can(arrays[0]):
        return list(arrays)
    memory = mmap.mmap(-1, sum(sizes) + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE
    copies = []
    arrays.reverse()
    for size in sizes:
        array = np.asarray(arrays.pop())
        copy = np.frombuffer(memory, np.uint8, array.nbytes, start)
        copy[:] = array.reshape(-1).view(np.uint8)  # as bytes: numpy copies bfloat16 one by one
        start += size
        shaped = copy.view(array.dtype).reshape(array.shape)
        copies.append(jax.device_put(shaped, may_alias=True))
    return copies


def use_huge_pages(arrays: Sequence[jax.Array]) -> None:
    """Moves CPU arrays into huge pages where they are; those that adjoin, together.

    That needs Linux 6.1; an older one is told that they may be moved, and does it when it likes.
    It takes a while: a virtual machine may have to ask its host for each such page, and only to
    have 200 MB of them took 0.3 to 0.5 s where 0.04 do.
    """
    if not arrays or not _can(arrays[0]):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, stop in _ranges(arrays):
        first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        length = stop // _HUGE_PAGE * _HUGE_PAGE - first
        if length > 0:
            for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
                madvise(first, length, advice)


def _ranges(arrays: Sequence[jax.Array]) -> list[tuple[int, int]]:
    """Addresses where memory that arrays fill begins and ends."""
    ranges: list[tuple[int, int]] = []
    for array in arrays:
        start = array.unsafe_buffer_pointer()
        before = ranges[-1] if ranges else None
        if before is not None and 0 <= start - before[1] < _LINE:
            ranges[-1] = before[0], start + array.nbytes
        else:
            ranges.append((start, start + array.nbytes))
    return ranges


def _can(array: jax.Array) -> bool:
    """Whether this is Linux, and the array in its memory."""
    return sys.platform.startswith("linux") and next(iter(array.devices())).platform == "cpu"
