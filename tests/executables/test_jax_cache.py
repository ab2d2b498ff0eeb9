"""JAX's cache of compiled programs, as it is kept in our folder."""

from __future__ import annotations

import os

import jax
import pytest

from gemma_nb import trust
from gemma_nb.executables import jax_cache


@pytest.fixture
def entries(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_NB_CACHE", str(tmp_path))
    return jax_cache.Entries(tmp_path / "jax")


def test_what_is_put_comes_back(entries):
    assert entries.get("key") is None
    entries.put("key", b"program")
    assert entries.get("key") == b"program"
    assert [file.name for file in entries._path.iterdir()] == ["key-cache"]


@pytest.mark.parametrize("damage", [b"", b"abc", b"program\0\0\0\0", b"half"])
def test_a_damaged_entry_is_replaced(entries, damage):
    """JAX leaves one that is there as it is, and warns in every process."""
    entries.put("key", b"program")
    (entries._path / "key-cache").write_bytes(damage)
    assert entries.get("key") is None
    entries.put("key", b"program")
    assert entries.get("key") == b"program"


def test_what_has_a_place_elsewhere_is_not_kept_here(entries):
    with jax_cache.aside():
        entries.put("key", b"program")
    assert entries.get("key") is None
    entries.put("key", b"program")
    with jax_cache.aside():
        assert entries.get("key") is None


def test_the_oldest_entries_are_dropped_beyond_the_limit(entries, monkeypatch):
    monkeypatch.setenv("GEMMA_NB_CACHE_JAX_GB", "5e-8")
    for i, key in enumerate("abc"):
        entries.put(key, b"x" * 10)
        os.utime(entries._path / f"{key}-cache", (i, i))
    entries.get("a")  # is used now
    entries.put("d", b"x" * 10)
    assert {file.name[0] for file in entries._path.iterdir()} == {"a", "c", "d"}


def test_jaxs_own_limit_holds_where_it_is_set(entries):
    jax.config.update("jax_compilation_cache_max_size", 20)
    try:
        for key in "ab":
            entries.put(key, b"x" * 10)
    finally:
        jax.config.update("jax_compilation_cache_max_size", -1)
    assert [file.name for file in entries._path.iterdir()] == ["b-cache"]


def test_nothing_is_read_where_others_can_write(entries, monkeypatch):
    entries.put("key", b"program")
    file = entries._path / "key-cache"
    for path in (entries._path.parent, entries._path, file):
        before = path.stat().st_mode
        path.chmod(before | 0o002)
        assert entries.get("key") is None
        path.chmod(before)
    assert entries.get("key") == b"program"
    assert trust.distrust(entries._path, entries._path.parent) == ""


def test_a_folder_that_cannot_be_written_to_is_read(entries, monkeypatch):
    entries.put("key", b"program")

    def refuse(*_args, **_options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    assert entries.get("key") == b"program"
    entries.put("another", b"program")
    assert entries.get("another") is None
