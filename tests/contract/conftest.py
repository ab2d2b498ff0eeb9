"""Collected only where gm is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if TYPE_CHECKING:
    from gemma_nb.model import GemmaTransformer
    from gemma_nb.text.tokenizer import Tokenizer

collect_ignore_glob = [] if importlib.util.find_spec("gemma") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            # What gm and its libraries deprecate inside themselves is not ours to mend.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """gm adds booleans to integers, which our own tests forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def lively(
    tiny_model: tuple[GemmaTransformer, Tokenizer],
) -> tuple[GemmaTransformer, Tokenizer]:
    """The tiny model with weights so large that attention is uneven."""
    model, tokenizer = tiny_model
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), model.params)
    return model.replace(params=params), tokenizer
