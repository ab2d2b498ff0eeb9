"""True where a model fits into this machine, asked before anything is loaded."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_nb.config import TransformerConfig
from gemma_nb.errors import CheckpointError

if TYPE_CHECKING:
    from jax.sharding import Mesh

ITEM_BYTES = {"bfloat16": 2, "float32": 4}

# Loading holds the parameters and the tensor that is being converted: the vocabulary of the small
# models is most of them.  Loaders are tested to stay below this multiple of the parameters.
LOADING = 1.3

_CGROUP = Path("/sys/fs/cgroup")
_UNITS = ("B", "kB", "MB", "GB", "TB")


def bytes_text(count: float) -> str:
    """536_870_912 -> "537 MB"; decimal units, three digits."""
    power = min(int(math.log10(max(count, 1)) // 3), len(_UNITS) - 1)
    value = count / 1000**power
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {_UNITS[power]}"


def param_bytes(config: TransformerConfig, dtype: str) -> int:
    """Bytes of the parameters in "bfloat16" or "float32"."""
    return config.num_params() * ITEM_BYTES[dtype]


def loading_bytes(config: TransformerConfig, dtype: str) -> int:
    """Most bytes in use while the model is loaded."""
    return int(LOADING * param_bytes(config, dtype))


def total() -> int:
    """Bytes of memory of this machine, or that its container is limited to; 0 if unknown."""
    limits = [_meminfo().get("MemTotal", 0) or _physical(), _cgroup_limit()]
    return min((n for n in limits if n), default=0)


def available() -> int:
    """Bytes that programs can still take without swapping; 0 if unknown."""
    free = _meminfo().get("MemAvailable", 0) or total()
    limit = _cgroup_limit()
    if limit:
        # The kernel counts pages of files that it can drop at any time as used.
        used = _number(_CGROUP / "memory.current") - _cgroup_stat("inactive_file")
        free = min(free, max(limit - max(used, 0), 1))
    return free


def refuse_what_cannot_fit(
    config: TransformerConfig, dtype: str, *, name: str, mesh: Mesh | None = None
) -> None:
    """Say before a load starts that it cannot end well.

    Args:
      config: the model's numbers.
      dtype: of its parameters.
      name: of the checkpoint, for the message.
      mesh: from `placement.resolve`: the parameters are split over its devices.

    Raises:
      CheckpointError: there is less memory than loading takes; `force=True` of `gnb.load` is the
        way round.
    """
    needed, where, there = loading_bytes(config, dtype), "this machine has", available()
    devices = _accelerators(mesh)
    if devices:
        needed, where = (
            param_bytes(config, dtype),
            f"{len(devices)} {devices[0].platform} devices have",
        )
        there = sum(_free_on(device) for device in devices)
    if not there or needed <= there:
        return
    smaller = ' or dtype="bfloat16"' if dtype == "float32" else ""
    raise CheckpointError(
        f"{name}: loading {config.num_params() / 1e9:.2f}B parameters in {dtype} takes about "
        f"{bytes_text(needed)}, and {where} {bytes_text(there)} free; take a smaller "
        f"model (see gnb.list_models()){smaller}, spread it over more devices with mesh=..., or "
        "try nevertheless with force=True"
    )


def _accelerators(mesh: Mesh | None) -> list[Any]:
    """The devices that parameters go to, where they have memory of their own."""
    import jax

    devices = list(mesh.devices.flat) if mesh is not None else jax.devices()[:1]
    return [d for d in devices if d.platform != "cpu"]


def _free_on(device: Any) -> int:
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if len(f) == 3 and f[2] == "kB"}


def _physical() -> int:
    if sys.platform == "win32":
        return _physical_windows()
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _physical_windows() -> int:
    kilobytes = ctypes.c_ulonglong()
    windll: Any = vars(ctypes).get("windll")
    known = windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
    return kilobytes.value * 1024 if known else 0


def _cgroup_limit() -> int:
    """The container's limit (control groups version 2); 0 where there is none."""
    return _number(_CGROUP / "memory.max")


def _cgroup_stat(field: str) -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) for x in lines if x.startswith(f"{field} ")), 0)


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max": no limit
        return 0
