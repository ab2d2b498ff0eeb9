"""What the processor is good at, where it is known; nothing here starts a JAX device."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple


class Streams(NamedTuple):
    """From how many places at once a thread should read a matrix.

    Attributes:
      floating: of bfloat16 or float32 numbers.
      int8: of int8 numbers.
    """

    floating: int = 1
    int8: int = 1


ONE_PLACE = Streams()


def has_matrix_unit() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware that is made for it (AMX)."""
    return "amx_bf16" in _flags()


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, with or without a matrix unit."""
    return has_matrix_unit() or "avx512_bf16" in _flags()


def streams() -> Streams:
    """From how many places at once a thread should read a matrix to be fast.

    What fetches memory ahead of a thread follows each place on its own, and on AMD's processors it
    stops for a while at every 4 KiB.  Measured on two cores, matrices times a vector, in GB/s
    (what came after Zen 4 was not, and is taken to be like it):

    |                                      | 1 place | 2 | 4 | 8 |
    |--------------------------------------|------|------|------|------|
    | Zen 3, int8, a vocabulary of 168 MB  | 21   |      | 29   | 26   |
    | Zen 4, the same                      | 24.1 | 22.0 | 20.8 | 18.5 |
    | Zen 4, bfloat16, the layers of 270M  | 19.6 | 22.9 | 21.8 | 20.2 |
    """
    if _said().get("vendor_id") != "AuthenticAMD":
        return ONE_PLACE
    return Streams(floating=2) if "avx512f" in _flags() else Streams(floating=4, int8=4)


def _flags() -> frozenset[str]:
    return frozenset(_said().get("flags", "").split())


@functools.cache
def _said() -> dict[str, str]:
    """What an x86 processor under Linux says of its first core; empty elsewhere."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    core, _, _ = info.partition("\n\n")
    lines = (line.partition(":") for line in core.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
