"""Who is compared.  Imports nothing heavy: start-up is measured from here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

OURS, OURS_INT8 = "gemma_nb", "ours int8"
HF_BF16, HF_F32, LLAMA = "HF bf16", "HF f32", "llama.cpp"
GM, GM_STREAM = "gm bf16", "gm streaming"
NAMES = (OURS, OURS_INT8, LLAMA, HF_BF16, HF_F32, GM, GM_STREAM)
TRANSFORMER_LENS = "TransformerLens"  # where states are looked at, see inside.py

_LIBRARIES = {
    OURS: (),
    OURS_INT8: (),
    LLAMA: ("llama_cpp",),
    TRANSFORMER_LENS: ("transformer_lens",),
}


def gm_python() -> Path:
    """The interpreter that has gm, see `gm.py`."""
    return Path(__file__).parents[2] / ".venv-contract" / "bin" / "python"


def installed(name: str) -> bool:
    """Whether the contestant's libraries are here."""
    if name in (GM, GM_STREAM):
        return gm_python().exists()
    needs = _LIBRARIES.get(name, ("torch", "transformers"))
    return all(importlib.util.find_spec(module) for module in needs)
