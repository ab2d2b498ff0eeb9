"""Who is compared.  Imports nothing heavy: start-up is measured from here."""

from __future__ import annotations

import importlib.util

OURS, HF_BF16, HF_F32, LLAMA = "gemma_nb", "HF bf16", "HF f32", "llama.cpp"
NAMES = (OURS, HF_BF16, HF_F32, LLAMA)


def installed(name: str) -> bool:
    """Whether the contestant's libraries are here."""
    needs = {OURS: (), LLAMA: ("llama_cpp",)}.get(name, ("torch", "transformers"))
    return all(importlib.util.find_spec(module) for module in needs)
