"""Files, and folders of something else."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.checkpoints import tiny, written
from tests.checkpoints.hostile.damage import (
    Bomb,
    Case,
)


def file_case(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder.mkdir()
        (folder / name).write_bytes(content)
        return folder / name

    return write


def gguf_case(change: Callable[[dict], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder.mkdir()
        arrays = tiny.tensors()
        change(arrays)
        return tiny.write(folder / "model.gguf", arrays=arrays)

    return write


def split_case(
    change: Callable[[Path], object] = lambda folder: None, **options
) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        written.gguf_split(folder, written.params(), **options)
        change(folder)
        return folder / "tiny-00001-of-00002.gguf"

    return write


def nan_gguf(arrays: dict) -> None:
    arrays["blk.1.ffn_up.weight"][0, 0] = np.inf


def twice(folder: Path) -> None:
    arrays = {"token_embd.weight": np.ones((276, 32), np.float32)}
    fields = {**tiny.FIELDS, "split.no": 1, "split.count": 2, "split.tensors.count": 28}
    tiny.write(folder / "tiny-00002-of-00002.gguf", fields=fields, arrays=arrays)


def pickle_file(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "weights.gguf"  # whatever its name says
    path.write_bytes(pickle.dumps(Bomb(folder / "ran")))
    return path


def torch_file(folder: Path) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(folder / "gemma.ckpt", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Bomb(folder / "ran")))
    return folder / "gemma.ckpt"


def of_architecture(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder.mkdir()
        return tiny.write(folder / "model.gguf", architecture=name)

    return write


def sparse(raw: bytes) -> Callable[[Path], Path]:
    """A GGUF file of 40 GB that takes a few blocks on disk."""

    def write(folder: Path) -> Path:
        path = file_case("huge.gguf", raw)(folder)
        os.truncate(path, 40 << 30)
        return path

    return write


def objects(folder: Path) -> Path:
    folder.mkdir()
    bomb = np.array([Bomb(folder / "ran")], object)
    np.save(folder / "weights.npy", bomb, allow_pickle=True)
    return folder / "weights.npy"


def linked_gguf(folder: Path) -> Path:
    written.gguf_file(folder.with_name("outside"), written.params())
    folder.mkdir()
    (folder / "model.gguf").symlink_to(folder.with_name("outside") / "tiny.gguf")
    return folder


def pipe_in_a_folder(folder: Path) -> Path:
    return pipe(folder).parent


def pipe(folder: Path) -> Path:
    folder.mkdir()
    os.mkfifo(folder / "pipe.gguf")
    return folder / "pipe.gguf"


CASES: dict[str, Case] = {
    "pickle file": (pickle_file, r"weights.gguf: it is a pickle; a pickle file can run any code"),
    "torch file": (torch_file, r"gemma.ckpt: it is a file of torch, a pickle .*can run any code"),
    "text": (file_case("model.gguf", b"hello world"), "this is not a GGUF file; pass the path"),
    "one safetensors file": (
        file_case("model.safetensors", b"\0" * 99),
        "is one file of a Hugging Face checkpoint; pass the path of its folder",
    ),
    "pipe": (pipe, "pipe.gguf: is a pipe; pass the path"),
    "pipe in a folder": (pipe_in_a_folder, "pipe.gguf is a pipe"),
    "array of objects": (objects, "weights.npy: it is one array of numpy .*get the"),
    "zip": (file_case("model.zip", b"PK\3\4" * 99), "a pickle file can run any code"),
    "GGUF linked out of the folder": (linked_gguf, "leads out of its folder"),
    "GGUF with a tensor besides": (
        gguf_case(lambda arrays: arrays.update({"blk.0.lora_a": np.ones(3, np.float32)})),
        "tensor 'blk.0.lora_a' belongs to no Gemma",
    ),
    "GGUF of more layers than it says": (
        gguf_case(lambda a: a.update({"blk.7.attn_q.weight": np.ones((3, 3), np.float32)})),
        "tensor 'blk.7.attn_q.weight' belongs to no Gemma 1, 2 or 3 text model of 2 layers",
    ),
    "GGUF with a head": (
        gguf_case(lambda a: a.update({"output.weight": a["token_embd.weight"] + 1})),
        "tensor 'output.weight': a head of its own",
    ),
    "GGUF of another shape": (
        gguf_case(lambda a: a.update({"blk.0.attn_q.weight": np.ones((3, 3), np.float32)})),
        r"tensor 'blk.0.attn_q.weight': expected shape \(64, 32\)",
    ),
    "GGUF of integers": (
        gguf_case(lambda a: a.update({"blk.0.attn_q.weight": np.ones((64, 32), np.int32)})),
        "tensor 'blk.0.attn_q.weight' is stored as I32",
    ),
    "GGUF of a billion fields": (
        sparse(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 30)),
        "field count: 1,073,741,824 entries announced, expected at most",
    ),
    "GGUF of a text of 30 GB": (
        sparse(struct.pack("<4sIQQQcIQ", b"GGUF", 3, 0, 1, 1, b"k", 8, 30 << 30)),
        "metadata field 'k': a text of 32,212,254,720 bytes",
    ),
    "GGUF of a billion texts": (
        sparse(struct.pack("<4sIQQQcIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 1 << 31)),
        "metadata field 'k': 2,147,483,648 entries announced, expected at most",
    ),
    "empty folder": (lambda f: f.mkdir() or f, "holds no checkpoint; pass the path of"),
    "GGUF of NaN": (gguf_case(nan_gguf), r"layer_1/mlp/gating_einsum holds NaN or infinity"),
    "GGUF without a tensor": (
        gguf_case(lambda arrays: arrays.pop("blk.1.ffn_up.weight")),
        "tensor 'blk.1.ffn_up.weight' is missing",
    ),
    "GGUF of Gemma 3n": (of_architecture("gemma3n"), "got 'gemma3n'"),
    "GGUF of Gemma 4": (of_architecture("gemma4"), "got 'gemma4'"),
    "split GGUF without a part": (
        split_case(lambda f: (f / "tiny-00002-of-00002.gguf").unlink()),
        "tiny-00002-of-00002.gguf is missing; .* 2 files",
    ),
    "split GGUF in the wrong order": (
        split_case(changes={1: {"split.no": 0}}),
        "tiny-00002-of-00002.gguf: metadata field 'split.no': expected 1, got 0",
    ),
    "split GGUF that lacks tensors": (
        split_case(changes={0: {"split.tensors.count": 99}}),
        "'split.tensors.count': expected 28, got 99",
    ),
    "split GGUF of two models": (
        split_case(
            lambda f: shutil.copy(f / "tiny-00001-of-00002.gguf", f / "tiny-00002-of-00002.gguf")
        ),
        "'split.no': expected 1, got 0",
    ),
    "split GGUF with a tensor twice": (
        split_case(twice),
        "tensor 'token_embd.weight' is in another file as well",
    ),
    "split GGUF renamed": (
        lambda f: split_case()(f).rename(f / "one.gguf"),
        "this is one of 2 files of a model",
    ),
}
