"""Where the pages of an array lie in memory.

A step reads all weights from end to end, and in pages of 4 KiB the processor spends part of the
time on looking up where the next one lies (measured: 24 GB/s, 29 with pages of 2 MiB).  To have
those is a matter of advice, to Linux; a kernel that has none free uses small ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys

import jax
import numpy as np

_HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on arm64 with 4 KiB pages
# A cache line: JAX uses memory that begins at one as it is, and copies other memory.
_LINE = 64
# From <linux/mman.h>; Python's mmap module has no name for the second.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def use_huge_pages(array: jax.Array) -> None:
    """Asks for huge pages where a CPU array lies, which should be much larger than one.

    Nobody waits for an array that is still being computed: what is written later comes to lie in
    such pages.  For what is written already it needs Linux 6.1; before, the kernel may do it later.
    """
    if not _can(array):
        return
    start = array.unsafe_buffer_pointer()
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    length = (start + array.nbytes) // _HUGE_PAGE * _HUGE_PAGE - first
    if length <= 0:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        madvise(first, length, advice)


def in_huge_pages(arrays: list[jax.Array]) -> list[jax.Array]:
    """The same arrays, copied one behind the other into pages of 2 MiB where that is possible.

    So arrays lie in them that are smaller than one.

    Args:
      arrays: on one device.  The list is emptied as they are copied, so that what nobody else holds
        is freed, and hardly more memory is needed than before; where they are not copied, it stays.
    """
    sizes = [-(-array.nbytes // _LINE) * _LINE for array in arrays]
    if not arrays or not _can(arrays[0]):
        return list(arrays)
    memory = mmap.mmap(-1, sum(sizes) + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without such pages
        memory.madvise(mmap.MADV_HUGEPAGE)
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


def _can(array: jax.Array) -> bool:
    """Whether this is Linux, and the array in its memory."""
    return sys.platform.startswith("linux") and next(iter(array.devices())).platform == "cpu"
