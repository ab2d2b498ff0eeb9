from __future__ import annotations

from pathlib import Path

import pytest

from gemma_nb.checkpoints import load as front_door
from tests.checkpoints import tiny


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> Path:
    """A tiny Gemma 3, everything in float32."""
    return tiny.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_q8_gguf(tmp_path_factory) -> Path:
    """The same with its projections in Q8_0."""
    return tiny.write(tmp_path_factory.mktemp("gguf") / "tiny-q8.gguf", quantize=True)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GEMMA_NB_CACHE", str(folder))
    return folder


@pytest.fixture
def no_compilation_cache(monkeypatch) -> None:
    """The tests' own setting of JAX's compilation cache stays as it is."""
    monkeypatch.setattr(front_door, "use_compilation_cache", lambda: None)
