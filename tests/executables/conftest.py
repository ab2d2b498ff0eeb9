"""An empty cache folder."""

from __future__ import annotations

import threading

import jax
import pytest

from gemma_nb.sampling.compile_ahead import COMPILING


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache folder, which is in use."""
    # What other tests have begun to compile on another thread would be kept there.
    for thread in threading.enumerate():
        if thread.name == COMPILING:
            thread.join()
    monkeypatch.setenv("GEMMA_NB_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)
