from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_nb.cache import cache_dir
from gemma_nb.checkpoints import converted
from gemma_nb.errors import CheckpointError

BF16 = ml_dtypes.bfloat16
PARAMS = {
    ("embedder", "input_embedding"): np.arange(600, dtype=np.float32).reshape(30, 20),
    ("layer_0", "mlp", "linear"): np.arange(12, dtype=np.float32).reshape(3, 4).T,
    ("final_norm", "scale"): np.linspace(-1, 1, 5).astype(BF16),
}
METADATA = {
    "text": "Grüße",
    "number": 7,
    "real": 0.5,
    "flag": True,
    "list": ["x"],
    "array": np.ones(2),
}


@pytest.fixture
def path(cache) -> Path:
    return converted.path_for("ab" * 32, "float32")


@pytest.fixture
def written(path) -> Path:
    converted.write(path, PARAMS.items(), b"model\0bytes", METADATA)
    return path


def assert_whole(path):
    ready = converted.read(path)
    assert list(ready.params) == list(PARAMS)
    for name, array in PARAMS.items():
        assert ready.params[name].dtype == array.dtype
        assert np.array_equal(ready.params[name], array)


def test_what_is_written_comes_back(written):
    assert_whole(written)
    ready = converted.read(written)
    assert ready.tokenizer == b"model\0bytes"
    assert ready.metadata == {"text": "Grüße", "number": 7, "real": 0.5, "flag": True}
    assert os.listdir(written.parent) == [written.name]


def test_arrays_are_mapped_and_cannot_be_written_to(written):
    array = converted.read(written).params["embedder", "input_embedding"]
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_the_safetensors_library_reads_the_file(written):
    tensors = load_file(written)
    assert tensors.pop("tokenizer_model").tobytes() == b"model\0bytes"
    assert {tuple(name.split("/")) for name in tensors} == set(PARAMS)
    for name, array in PARAMS.items():
        assert np.array_equal(tensors["/".join(name)], array)


def test_nothing_there_is_none(path):
    assert converted.read(path) is None


def test_different_sources_dtypes_and_versions_have_different_files(cache, monkeypatch):
    paths = {converted.path_for(sha, dtype) for sha in ("a", "b") for dtype in converted.DTYPES}
    monkeypatch.setattr(converted, "CONVERTER_VERSION", converted.CONVERTER_VERSION + 1)
    paths.add(converted.path_for("a", "float32"))
    assert len(paths) == 5


@pytest.mark.parametrize("kept", [0, 7, 1000, 1 << 20, (1 << 20) + 1000, -1])
def test_truncation_is_noticed(written, kept):
    os.truncate(written, kept if kept >= 0 else written.stat().st_size + kept)
    with pytest.raises(converted.DamagedError):
        converted.read(written)


def test_a_longer_file_is_noticed(written):
    with written.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(converted.DamagedError):
        converted.read(written)


def test_every_changed_byte_is_noticed(written, monkeypatch):
    """Of the length field, the names, the checksums, the padding, the weights, the tokenizer."""
    raw = bytearray(written.read_bytes())
    data = 1 << 20
    for at in [*range(0, 600, 7), data - 1, *range(data, len(raw), 97), len(raw) - 1]:
        raw[at] ^= 1
        written.write_bytes(raw)
        with pytest.raises(converted.DamagedError):
            converted.read(written)
        raw[at] ^= 1
    written.write_bytes(raw)
    assert_whole(written)


def test_blocks_are_checked_one_by_one(path, monkeypatch):
    monkeypatch.setattr(converted, "_BLOCK", 256)
    converted.write(path, PARAMS.items(), b"model", {})
    assert_whole(path)
    header = json.loads(path.read_bytes()[8 : 1 << 20])
    assert len(header["__metadata__"]["crc32"]) == 8 * (1 + -(-(2400 + 48 + 10 + 5) // 256))


def test_a_conversion_that_fails_leaves_nothing(path):
    def broken():
        yield from list(PARAMS.items())[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted.write(path, broken(), b"", {})
    assert os.listdir(path.parent) == []


def test_a_source_cannot_pass_for_checksums(path):
    """Zeros and digits in the metadata are not mistaken for the field that is filled in last."""
    metadata = {"general.name": "0" * 64}
    converted.write(path, PARAMS.items(), b"", metadata)
    assert_whole(path)
    assert converted.read(path).metadata == metadata


def test_concurrent_writers_leave_one_whole_file(path):
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(converted.write, path, PARAMS.items(), b"", {}) for _ in range(8)]:
            done.result()
    assert_whole(path)
    assert os.listdir(path.parent) == [path.name]


def test_what_was_not_read_for_longest_is_dropped_and_what_is_in_use_is_not(cache, monkeypatch):
    paths = [converted.path_for(name * 64, "float32") for name in "abcde"]
    for i, path in enumerate(paths[:4]):
        converted.write(path, PARAMS.items(), b"model", {})
        os.utime(path, (i, i))
    in_use = converted.read(paths[1])
    os.utime(converted._note(paths[1])[0], (1, 1))
    converted.read(paths[0])
    one = paths[0].stat().st_size / 1e9
    monkeypatch.setenv("GEMMA_NB_CACHE_WEIGHTS_GB", str(3.5 * one))
    converted.write(paths[4], PARAMS.items(), b"model", {})
    # The first was read last, the second is mapped.
    assert [path.exists() for path in paths] == [True, True, False, False, True]
    assert np.array_equal(in_use.params["final_norm", "scale"], PARAMS["final_norm", "scale"])


def test_notes_of_files_are_not_kept_without_end(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(converted, "_MAX_NOTES", 2)
    for i in range(5):
        file = tmp_path / str(i)
        file.write_text(str(i))
        converted.file_sha256(file)
    assert len(list((cache / "hashes").iterdir())) == 3  # one more than are counted before it


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_processes_are_removed(path):
    path.parent.mkdir(parents=True)
    host = socket.gethostname()
    kept = [
        path.with_name(f".w.{host}.{os.getpid()}.0a.tmp"),  # at work
        path.with_name(f".w.elsewhere.{dead_pid()}.0a.tmp"),  # another machine's, recent
        path.with_name("other.tmp"),
    ]
    removed = [
        path.with_name(f".w.{host}.{dead_pid()}.0a.tmp"),
        path.with_name(".w.elsewhere.1.0a.tmp"),  # another machine's, two days old
    ]
    for file in [*kept, *removed]:
        file.write_bytes(b"x")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(removed[1], (two_days_ago, two_days_ago))
    converted.write(path, PARAMS.items(), b"", {})
    assert sorted(os.listdir(path.parent)) == sorted([path.name, *(file.name for file in kept)])


def test_an_unusable_folder_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMMA_NB_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="GEMMA_NB_CACHE"):
        converted.write(converted.path_for("a", "float32"), PARAMS.items(), b"", {})


def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch):
    monkeypatch.delenv("GEMMA_NB_CACHE", raising=False)
    assert "gemma_nb" in cache_dir().parts
    monkeypatch.setenv("GEMMA_NB_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"


def test_a_hash_is_remembered_until_the_file_changes(cache, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    first = converted.file_sha256(file)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    with monkeypatch.context() as patch:
        patch.setattr(converted, "sha256_of", lambda paths: pytest.fail("hashed again"))
        assert converted.file_sha256(file) == first
    file.write_bytes(b"two")
    assert converted.file_sha256(file) != first


def test_a_damaged_note_of_a_hash_is_no_obstacle(cache, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    first = converted.file_sha256(file)
    for note in (cache / "hashes").iterdir():
        note.write_text("[1, 2")
    assert converted.file_sha256(file) == first


def test_parts_hash_like_the_whole(tmp_path):
    for name, content in (("whole", b"abcdef"), ("a", b"abc"), ("b", b"def")):
        (tmp_path / name).write_bytes(content)
    parts = converted.sha256_of([tmp_path / "a", tmp_path / "b"])
    assert parts == converted.sha256_of([tmp_path / "whole"])
