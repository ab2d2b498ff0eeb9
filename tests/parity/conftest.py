"""Models that the parity tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import gemma_nb as gnb
from tests.parity.cases import REAL

if TYPE_CHECKING:
    from gemma_nb.model import GemmaTransformer
    from gemma_nb.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def float32_model() -> tuple[GemmaTransformer, Tokenizer]:
    """The default model with float32 parameters (1.1 GB: kept for one module only)."""
    return gnb.load(REAL, dtype="float32", progress=False)
