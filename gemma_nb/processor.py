"""What the processor is good at, where it is known; nothing here starts a JAX device."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple


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

# What /proc/cpuinfo tells processors apart by: x86, ARM, and others.
_PER_CORE = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision")
_TELLING = (
    *("vendor_id", "model name", "flags", "Features", *_PER_CORE),
    *("isa", "uarch", "cpu", "revision", "features", "machine", "Model Name", "CPU Family"),
)
_WINDOWS_FEATURES = 128  # numbers of IsProcessorFeaturePresent; some 90 have a meaning


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
    """Which processor it is, and what it can do: what runs on one may be no instruction on another.

    Of Linux what it says of every core: those of one ARM processor are often of several kinds.  Of
    macOS and Windows what the system was asked about instructions.
    """
    said = _said()
    if not said:
        return "\n".join([platform.machine(), platform.processor(), *_instructions()])
    return "\n".join(f"{name}: {said[name]}" for name in _TELLING if name in said)


def _vendor() -> str:
    return _said().get("vendor_id", "")


def _flags() -> frozenset[str]:
    return frozenset(_said().get("flags", "").split())


@functools.cache
def _said() -> dict[str, str]:
    """What Linux says of the first core, and of what tells processors apart all that differs."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    said: dict[str, str] = {}
    for core in info.split("\n\n"):
        for line in core.splitlines():
            name, _, value = (part.strip() for part in line.partition(":"))
            if name not in said:
                said[name] = value
            elif name in _PER_CORE and value not in said[name].split(" | "):
                said[name] += f" | {value}"
    return said


def _instructions() -> list[str]:
    """What the system says about instructions, where it is not Linux."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "hw.optional", "machdep.cpu"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
            return sorted(done.stdout.splitlines())
    if sys.platform == "win32":
        has: Any = vars(ctypes)["windll"].kernel32.IsProcessorFeaturePresent
        return [str(number) for number in range(_WINDOWS_FEATURES) if has(number)]
    return []
