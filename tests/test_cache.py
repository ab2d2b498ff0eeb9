"""The cache folder: what others may do in it, and how much of it is kept."""

from __future__ import annotations

import math
import os
import stat

import numpy as np
import pytest

from gemma_nb import cache


def files(folder, **ages):
    """A file of ten bytes per name, last used at so many seconds."""
    for name, seconds in ages.items():
        (folder / name).write_bytes(b"x" * 10)
        os.utime(folder / name, (seconds, seconds))


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_used_last_stays(tmp_path):
    files(tmp_path, a=3, b=1, c=2, d=4)
    cache.drop_oldest(tmp_path, "*", 40)
    assert left(tmp_path) == ["a", "b", "c", "d"]
    cache.drop_oldest(tmp_path, "*", 29)
    assert left(tmp_path) == ["a", "d"]
    files(tmp_path, e=5)
    cache.drop_oldest(tmp_path, "*", math.inf, count=2)
    assert left(tmp_path) == ["d", "e"]
    cache.drop_oldest(tmp_path, "*", 15, last_used=lambda file: 9 if file.name == "d" else 0)
    assert left(tmp_path) == ["d"]
    cache.drop_oldest(tmp_path, "*", 0)
    assert left(tmp_path) == ["d"]  # what has just been used is used however large it is


def test_what_is_mapped_stays_until_it_is_let_go_of(tmp_path):
    files(tmp_path, a=1, b=2)
    with open(tmp_path / "a", "rb") as file:
        cache.lock_shared(file)
        mapped = np.memmap(file, np.uint8, "r")
    part = mapped[2:4]
    del mapped
    cache.drop_oldest(tmp_path, "*", 0)
    assert left(tmp_path) == ["a", "b"]
    assert part.tobytes() == b"xx"
    del part
    cache.drop_oldest(tmp_path, "*", 0)
    assert left(tmp_path) == ["b"]


def test_a_held_file_is_locked_while_it_is_there(tmp_path):
    path = tmp_path / "held"
    with cache.held(path):
        assert cache.is_locked(path)
        assert left(tmp_path) == ["held"]
    assert left(tmp_path) == []
    assert not cache.is_locked(path)
    path.touch()  # as a process leaves it that dies
    assert not cache.is_locked(path)


@pytest.mark.skipif(os.name != "posix", reason="modes say nothing on Windows")
def test_others_cannot_write_to_what_is_made_whatever_the_mask(tmp_path):
    before = os.umask(0)
    try:
        cache.make(tmp_path / "a" / "b")
        with cache.temporary(tmp_path / "a" / "b" / "file") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    for path in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "file"):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def test_limits_are_set_by_variables(monkeypatch):
    for part in ("weights", "programs", "jax"):
        monkeypatch.delenv(f"GEMMA_NB_CACHE_{part.upper()}_GB", raising=False)
    assert cache.limit_bytes("weights") == 64e9
    monkeypatch.setenv("GEMMA_NB_CACHE_WEIGHTS_GB", " 0.5 ")
    assert cache.limit_bytes("weights") == 5e8
    assert cache.limit_bytes("jax") == 2e9
    monkeypatch.setenv("GEMMA_NB_CACHE_WEIGHTS_GB", "inf")
    assert cache.limit_bytes("weights") == math.inf
    for wrong in ("-1", "nan", "20 GB"):
        monkeypatch.setenv("GEMMA_NB_CACHE_WEIGHTS_GB", wrong)
        with pytest.raises(ValueError, match=r"number of gigabytes .* GEMMA_NB_CACHE_WEIGHTS_GB"):
            cache.limit_bytes("weights")
