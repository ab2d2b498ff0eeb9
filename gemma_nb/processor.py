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

_AMD, _INTEL = "AuthenticAMD", "GenuineIntel"


def has_matrix_unit() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware that is made for it (AMX)."""
    return "amx_bf16" in _flags()


def prefers_bfloat16() -> bool:
    """Whether one product of bfloat16 matrices is faster than one of float32.

    With a matrix unit it is, and on Zen 4 without one.  On Intel's processors the instructions for
    it alone gain nothing: on two cores of an Emerald Rapids, 256 tokens times the layers of Gemma 3
    270M take 409 ms from bfloat16 and 298 from float32.
    """
    return has_matrix_unit() or (_vendor() == _AMD and "avx512_bf16" in _flags())


def streams() -> Streams:
    """From how many places at once a thread should read a matrix to be fast.

    What fetches memory ahead of a thread follows each place on its own, and stops for a while at
    every 4 KiB.  Measured on two cores, matrices times a vector, in GB/s (what came after Zen 4 was
    not, and is taken to be like it; nor were Intel's other processors with AVX-512):

    |                                              | 1 place | 2 | 4 | 8 |
    |----------------------------------------------|------|------|------|------|
    | Zen 3, int8, a vocabulary of 168 MB          | 21   |      | 29   | 26   |
    | Zen 4, the same                              | 24.1 | 22.0 | 20.8 | 18.5 |
    | Zen 4, bfloat16, the layers of 270M          | 19.6 | 22.9 | 21.8 | 20.2 |
    | Emerald Rapids, int8, the vocabulary         | 13.9 | 14.4 | 18.8 | 19.6 |
    | Emerald Rapids, bfloat16, the layers of 270M | 14.5 | 16.2 | 16.3 | 16.1 |
    """
    wide = "avx512f" in _flags()
    if _vendor() == _AMD:
        return Streams(floating=2) if wide else Streams(floating=4, int8=4)
    return Streams(floating=4, int8=8) if _vendor() == _INTEL and wide else ONE_PLACE


def described() -> str:
    """Which processor it is, and what it can do; empty where that is not known."""
    said = _said()
    return "\n".join(said.get(name, "") for name in ("vendor_id", "model name", "flags"))


def _vendor() -> str:
    return _said().get("vendor_id", "")


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
