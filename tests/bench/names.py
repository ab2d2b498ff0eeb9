"""Who is compared.  Imports nothing heavy: start-up is measured from here."""

from __future__ import annotations

import importlib.util

OURS, OURS_INT8 = "gemma_nb", "ours int8"
HF_BF16, HF_F32, LLAMA = "HF bf16", "HF f32", "llama.cpp"
NAMES = (OURS, OURS_INT8, HF_BF16, HF_F32, LLAMA)
TRANSFORMER_LENS = "TransformerLens"  # where states are looked at, see inside.py

_LIBRARIES = {
    OURS: (),
    OURS_INT8: (),
    LLAMA: ("llama_cpp",),
    TRANSFORMER_LENS: ("transformer_lens",),
}


def installed(name: str) -> bool:
    """Whether the contestant's libraries are here."""
    needs = _LIBRARIES.get(name, ("torch", "transformers"))
    return all(importlib.util.find_spec(module) for module in needs)
