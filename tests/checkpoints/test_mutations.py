"""Changed bytes in valid small checkpoints: they load, or are refused with a CheckpointError.

A short run by default; GEMMA_NB_MUTATION_SECONDS=60 looks elsewhere for that long, per format.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from gemma_nb.checkpoints import load as front_door
from gemma_nb.errors import CheckpointError
from tests.checkpoints import written

pytestmark = pytest.mark.usefixtures("cache", "no_compilation_cache")

SECONDS = float(os.environ.get("GEMMA_NB_MUTATION_SECONDS", "0"))
FORMATS = {
    "GGUF": written.gguf_file,
    "GGUF split": written.gguf_split,
    "safetensors": written.hugging_face,
    "Orbax": written.orbax_flat,
    "Orbax without a database": written.orbax_zarr,
}
_HEADER = 4096  # bytes from the start in which most of what matters stands


@st.composite
def changes(draw, size: int) -> list[tuple[int, bytes]]:
    """Places and what stands there afterwards."""
    near = st.integers(0, min(size, _HEADER) - 1)
    anywhere = st.integers(0, size - 1)
    some = st.binary(min_size=1, max_size=8)
    return draw(st.lists(st.tuples(near | anywhere, some), min_size=1, max_size=3))


def mutated(raw: bytes, draw) -> bytes:
    kind = draw(st.sampled_from(["change", "cut", "insert"]))
    if kind == "cut":
        return raw[: draw(st.integers(0, len(raw) - 1))]
    new = bytearray(raw)
    for at, some in draw(changes(len(raw))):
        new[at : at + (len(some) if kind == "change" else 0)] = some
    return bytes(new)


@pytest.mark.parametrize("name", FORMATS)
def test_only_a_checkpoint_error_comes_out(name, tmp_path, cache):
    path = FORMATS[name](tmp_path / "checkpoint", written.params())
    root = tmp_path / "checkpoint"
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.stat().st_size)
    counts = {"refused": 0, "loaded": 0}

    def load() -> None:
        try:
            front_door.load_params(path, progress=False)
            counts["loaded"] += 1
        except CheckpointError:
            counts["refused"] += 1
        shutil.rmtree(cache, ignore_errors=True)

    @hypothesis.settings(
        max_examples=25,
        database=None,
        derandomize=hypothesis.settings().derandomize and not SECONDS,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(data=st.data())
    def one(data: st.DataObject) -> None:
        file: Path = data.draw(st.sampled_from(files))
        raw = file.read_bytes()
        file.write_bytes(mutated(raw, data.draw))
        try:
            load()
        finally:
            file.write_bytes(raw)

    load()
    assert counts == {"refused": 0, "loaded": 1}
    end = time.monotonic() + SECONDS
    one()
    while time.monotonic() < end:
        one()
    assert counts["refused"]
    if SECONDS:
        with contextlib.suppress(OSError):
            print(f"{name}: {counts}")
