"""Damaged and hostile checkpoints, each through the front door.

Every one gives a CheckpointError that names the file, the tensor where it concerns one, what is
wrong and what to do, at once; nothing is left behind and no code of theirs runs.  Headers of GGUF
files have a table of their own in test_gguf.
"""

from __future__ import annotations

import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest

from gemma_nb.checkpoints import layout
from gemma_nb.checkpoints import load as front_door
from gemma_nb.errors import CheckpointError
from gemma_nb.model import GemmaTransformer
from tests.checkpoints import tiny, written
from tests.checkpoints.hostile import files, folders, orbax
from tests.checkpoints.hostile.damage import (
    Bomb,
    hf,
)

pytestmark = pytest.mark.usefixtures("cache", "no_compilation_cache")

CASES = {**folders.CASES, **orbax.CASES, **files.CASES}


# Every message ends in something to do.
REMEDY = re.compile(
    r"\b(download|pass|put|use|get|rename|convert|merged|update|rename the folder|dequantised)\b"
)
# What is not about one file names the folder; about one tensor or parameter, that as well.
ABOUT_ONE = re.compile(
    r"tensor|NaN|shape|parameter|scalar|integers|head of its own|twice|array of a|chunk|GGUF with",
    re.IGNORECASE,
)
ABOUT_SEVERAL = {"GGUF of a billion fields", "100,000 tensors", "20,000 parameters"}
ABOUT_SEVERAL |= {"split GGUF that lacks tensors", "split GGUF without a part"}
ABOUT_SEVERAL |= {"structure without parameters", "config with a field twice", "config of NaN"}
ABOUT_SEVERAL |= {"size that was never released", "stored configuration of NaN"}
ABOUT_SEVERAL |= {"one safetensors file", "pipe for a chunk"}


def snapshot(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", CASES)
def test_is_refused_by_name_at_once_and_leaves_nothing(name, tmp_path, cache):
    write, message = CASES[name]
    path = write(tmp_path / "checkpoint")
    before = snapshot(tmp_path)
    start, began = time.thread_time(), time.monotonic()
    with pytest.raises(CheckpointError, match=message) as error:
        front_door.load_params(path, progress=False)
    # Of the processor, which others may be using, too; a wait for something is seen all the same.
    seconds, waited = time.thread_time() - start, time.monotonic() - began
    said = str(error.value)
    assert str(tmp_path) in said
    assert REMEDY.search(said), said
    if ABOUT_ONE.search(name) and name not in ABOUT_SEVERAL:
        assert re.search(r"(tensor|parameter|field) '?[\w./]+", said), said
    assert seconds < 5  # 0.5 at most on a quiet machine; what reads or unpacks it all takes longer
    assert waited < 30
    left = {p for p in snapshot(tmp_path) - before if p.is_file() and "hashes" not in p.parts}
    assert left == set()
    assert not (tmp_path / "checkpoint" / "ran").exists()


def test_the_bomb_would_have_gone_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_the_table_is_long_enough():
    assert len(CASES) >= 100


# --- dictionaries ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((64, 32), np.nan, np.float32), "parameter layer_1/mlp/linear holds NaN"),
        (np.full((64, 32), 1e300), "parameter layer_1/mlp/linear holds NaN or infinity"),
        (np.full((64, 32), None, object), "layer_1/mlp/linear: expected floating-point .*object"),
        (np.ones((64, 32), np.int8), "layer_1/mlp/linear: expected floating-point .*int8"),
        (np.ones((3, 4), np.float32), r"layer_1/mlp/linear: expected shape \(64, 32\)"),
        ([1.0], "layer_1/mlp/linear is list, expected an array"),
        (None, "parameter layer_1/mlp/linear .* is missing"),
    ],
)
def test_dictionaries_are_held_to_the_same(value, message):
    flat = {**layout.flatten(written.params()), orbax.OLINEAR: value}
    if value is None:
        del flat[orbax.OLINEAR]
    with pytest.raises(CheckpointError, match=message) as error:
        GemmaTransformer.from_pretrained(layout.nest(flat), config=tiny.CONFIG)
    assert REMEDY.search(str(error.value))


@pytest.mark.parametrize("value", [None, [1], "x", np.ones(3)])
def test_what_is_no_dictionary_is_refused(value):
    with pytest.raises(CheckpointError, match=r"expected a dictionary of arrays, .*; pass"):
        GemmaTransformer.from_pretrained(value)


def test_what_nobody_may_read_is_refused(tmp_path, monkeypatch):
    """As the system refuses it; whoever runs the tests may be allowed everything."""
    path = hf(tmp_path / "checkpoint")
    real = open

    def refuse(file, *args, **kwargs):
        if str(file).endswith("config.json"):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json: .*give yourself"):
        front_door.load_params(path, progress=False)


def test_a_path_of_odd_bytes_is_no_hindrance(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    try:
        hf(path)
    except OSError:
        pytest.skip("this file system has no such names")
    assert front_door.load_params(path, progress=False)[0] == tiny.CONFIG
