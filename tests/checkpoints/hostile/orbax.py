"""Orbax folders."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorstore as ts

from gemma_nb.checkpoints import layout
from tests.checkpoints import written
from tests.checkpoints.hostile.damage import (
    Case,
    edit_json,
    fifo,
    truncate,
)


def orbax_case(
    change: Callable[[Path], object], write: Callable = written.orbax_flat
) -> Callable[[Path], Path]:
    def damaged(folder: Path) -> Path:
        write(folder, written.params())
        change(folder)
        return folder

    return damaged


def tree_case(change: Callable[[dict], object]) -> Callable[[Path], Path]:
    """A checkpoint of another tree under the tiny model's configuration."""

    def write(folder: Path) -> Path:
        flat = layout.flatten(written.params())
        change(flat)
        written.save_tree(layout.nest(flat), folder)
        written.add_config(folder)
        written.tokenizer(folder)
        return folder

    return write


def structure_case(change: Callable[[dict], object]) -> Callable[[Path], Path]:
    return orbax_case(lambda f: edit_json(f / "_METADATA", lambda m: change(m["tree_metadata"])))


def largest(folder: Path) -> Path:
    files = list((folder / "ocdbt.process_0" / "d").iterdir())
    return max(files, key=lambda path: path.stat().st_size)


def rename_key(tree: dict, new: str) -> None:
    next(iter(tree.values()))["key_metadata"][0]["key"] = new


def zarr_case(**fields: object) -> Callable[[Path], Path]:
    array = Path("transformer", "embedder.input_embedding", ".zarray")
    return orbax_case(
        lambda f: edit_json(f / array, lambda z: z.update(fields)), written.orbax_zarr
    )


ARRAY = Path("transformer", "embedder.input_embedding")
DEEP, SOME = "[" * 20_000 + "]" * 20_000, "[" * 900 + "]" * 900


def described_case(change: Callable[[str], str], *, together: bool) -> Callable[[Path], Path]:
    """A checkpoint with another description of one array, in its folder or in the database."""

    def write(folder: Path) -> None:
        if not together:
            file = folder / ARRAY / ".zarray"
            file.write_text(change(file.read_text()))
            return
        base = {"driver": "file", "path": f"{folder}/"}
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        key = min(key for key in store.list().result() if key.endswith(b"embedding/.zarray"))
        store.write(key, change(store.read(key).result().value.decode())).result()

    return orbax_case(write, written.orbax_flat if together else written.orbax_zarr)


def described_cases() -> dict[str, Case]:
    """Each of these ends the process, or takes all memory, where the library reads it."""
    changes: dict[str, tuple[Callable[[str], str], str]] = {
        "nested a little too deep": (
            lambda text: text.replace('"zstd"', SOME),
            "nested more than 64 deep",
        ),
        "nested far too deep": (
            lambda text: text.replace('"zstd"', DEEP),
            r"is not JSON .*recursion|more than 65,536 bytes about",
        ),
        "with its shape twice": (
            lambda text: text.replace("{", '{"shape": [1], ', 1),
            "'shape' is there twice",
        ),
        "of 100 kB": (
            lambda text: " " * 100_000 + text,
            "100,174 bytes about|more than 65,536 bytes about",
        ),
        "of a type with fields": (
            lambda text: text.replace('"<f4"', '[["a", "<f4", [1073741824]]]'),
            "expected a number type such as '<f4'",
        ),
        "of a huge type": (
            lambda text: text.replace('"<f4"', '"|V1073741824"'),
            "expected a number type such as '<f4'",
        ),
        "that is a list": (lambda text: f"[{text}]", "expected a JSON object, got list"),
    }
    return {
        f"parameter described {name}{' in a database' if together else ''}": (
            described_case(change, together=together),
            f"parameter embedder/input_embedding.*({message})|({message}) parameter embedder",
        )
        for name, (change, message) in changes.items()
        for together in (False, True)
    }


def config_of(**fields: object) -> Callable[[Path], Path]:
    """A checkpoint whose stored configuration is changed."""

    def change(about: dict) -> None:
        about["custom_metadata"]["gemma_nb"]["config"].update(fields)

    return orbax_case(lambda f: edit_json(f / "_CHECKPOINT_METADATA", change))


def compressed_bomb(folder: Path) -> None:
    """1 GB of zeros in 1 MB, where 35 kB are expected."""
    zeros, packer = bytes(1 << 24), zlib.compressobj(9)
    packed = b"".join(packer.compress(zeros) for _ in range(64)) + packer.flush()
    (folder / ARRAY / "0.0").write_bytes(packed)
    edit_json(folder / ARRAY / ".zarray", lambda z: z.update(compressor={"id": "zlib", "level": 9}))


def link_array(folder: Path) -> None:
    outside = folder.with_name("outside")
    shutil.move(folder / "d", outside)
    (folder / "d").symlink_to(outside)


def no_config(folder: Path) -> None:
    edit_json(folder / "_CHECKPOINT_METADATA", lambda about: about.update(custom_metadata={}))


OLINEAR = ("layer_1", "mlp", "linear")

CASES: dict[str, Case] = {
    **described_cases(),
    "structure nested too deep": (
        orbax_case(lambda f: (f / "_METADATA").write_text("[" * 200_000)),
        "_METADATA is not JSON",
    ),
    "no structure": (
        orbax_case(lambda f: (f / "_METADATA").unlink()),
        "its file _METADATA is missing; .*download",
    ),
    "structure that is no JSON": (
        orbax_case(lambda f: (f / "_METADATA").write_bytes(b"\x80\4.")),
        "_METADATA is not JSON",
    ),
    "structure without parameters": (
        orbax_case(lambda f: (f / "_METADATA").write_text('{"tree_metadata": {"a": 3}}')),
        "_METADATA does not list parameters",
    ),
    "no manifest": (
        orbax_case(lambda f: (f / "manifest.ocdbt").unlink()),
        "parameter .* cannot be read .*download",
    ),
    "damaged manifest": (
        orbax_case(lambda f: truncate(f / "manifest.ocdbt", 0.5)),
        "parameter .* cannot be read .*download",
    ),
    "arrays cut off": (
        orbax_case(lambda f: truncate(largest(f), 0.5)),
        "parameter .* cannot be read .*download",
    ),
    "arrays gone": (
        orbax_case(lambda f: largest(f).unlink()),
        "parameter .* cannot be read .*download",
    ),
    "missing parameter": (
        tree_case(lambda t: t.pop(OLINEAR)),
        r"layer_1/mlp/linear \(64, 32\) is missing",
    ),
    "unknown parameter": (
        tree_case(lambda t: t.update({("layer_1", "attn", "lora", "a"): np.ones(3)})),
        "layer_1/attn/lora/a belongs to no Gemma",
    ),
    "parameter of Gemma 3n": (
        tree_case(lambda t: t.update({("layer_1", "altup", "w"): np.ones(3)})),
        "layer_1/altup/w shows Gemma 3n, which is not supported",
    ),
    "parameter of another shape": (
        tree_case(lambda t: t.update({OLINEAR: np.ones((3, 4), np.float32)})),
        r"layer_1/mlp/linear: expected shape \(64, 32\), got \(3, 4\)",
    ),
    "parameter of integers": (
        tree_case(lambda t: t.update({OLINEAR: np.ones((64, 32), np.int8)})),
        "layer_1/mlp/linear: expected float32, .* got int8",
    ),
    "parameter of NaN": (
        tree_case(lambda t: t.update({OLINEAR: np.full((64, 32), np.nan, np.float32)})),
        "layer_1/mlp/linear holds NaN or infinity",
    ),
    "name that leads out": (
        structure_case(lambda tree: rename_key(tree, "transformer/../../../etc")),
        "has a name that leads out of its folder",
    ),
    "the same name twice": (
        structure_case(lambda tree: rename_key(tree, "transformer/final_norm")),
        "parameter final_norm/input_embedding cannot be read",
    ),
    "array of a huge size": (
        zarr_case(shape=[1 << 40, 32]),
        r"embedder/input_embedding: 3,98\d,\d{3},\d{3} chunks, expected at most",
    ),
    "chunks of a huge size": (
        zarr_case(chunks=[1 << 40, 32]),
        r"embedder/input_embedding: chunks of \(1099511627776, 32\)",
    ),
    "more chunks than can be read": (
        zarr_case(shape=[1 << 20, 32], chunks=[1, 1]),
        "embedder/input_embedding: 33,554,432 chunks, expected at most 65,536",
    ),
    "an array that is described as nonsense": (zarr_case(dtype="|O"), "cannot be read"),
    "folder of arrays that links out": (orbax_case(link_array), "leads out of its folder"),
    "size that was never released": (
        orbax_case(no_config),
        r"no released size .*; pass the configuration",
    ),
    "stored configuration of nonsense": (
        orbax_case(
            lambda f: edit_json(
                f / "_CHECKPOINT_METADATA",
                lambda a: a["custom_metadata"]["gemma_nb"]["config"].update(num_heads="four"),
            )
        ),
        "the stored configuration cannot be read",
    ),
    "stored configuration of a million layers": (
        config_of(layers=[{"window": 1, "rope_base": 1.0, "rope_scale": 1.0}] * 10**5),
        r"the stored configuration cannot be read \(100,000 layers\)",
    ),
    "stored configuration of NaN": (
        config_of(query_pre_attn_scalar=float("nan")),
        "the stored configuration cannot be read .query_pre_attn_scalar is nan",
    ),
    "stored configuration of endless windows": (
        config_of(layers=[{"window": float("inf"), "rope_base": 1.0, "rope_scale": 1.0}]),
        "the stored configuration cannot be read",
    ),
    "20,000 parameters": (
        structure_case(lambda t: t.update({f"x{i}": t[next(iter(t))] for i in range(20_000)})),
        "_METADATA lists 20,0.. parameters, expected",
    ),
    "name that is no text": (
        structure_case(lambda tree: rename_key(tree, "transformer/a\0b")),
        "has a name that",
    ),
    "manifest of 10 GB": (
        orbax_case(lambda f: os.truncate(f / "manifest.ocdbt", 10 << 30)),
        "manifest.ocdbt: 10,737,418,240 bytes",
    ),
    "description of 10 GB": (
        orbax_case(lambda f: os.truncate(f / ARRAY / ".zarray", 10 << 30), written.orbax_zarr),
        "zarray: 10,737,418,240 bytes about parameter embedder/input_embedding",
    ),
    "chunk of 10 GB": (
        orbax_case(lambda f: os.truncate(f / ARRAY / "0.0", 10 << 30), written.orbax_zarr),
        "0.0: 10,737,418,240 bytes about parameter embedder/input_embedding",
    ),
    "pipe for a chunk": (
        orbax_case(lambda f: fifo(f / ARRAY / "0.0"), written.orbax_zarr),
        "0.0 is a pipe",
    ),
    "chunk gone": (
        orbax_case(lambda f: (f / ARRAY / "0.0").unlink(), written.orbax_zarr),
        "parameter embedder/input_embedding cannot be read",
    ),
    "chunk that grows a thousand times": (
        orbax_case(compressed_bomb, written.orbax_zarr),
        "parameter embedder/input_embedding cannot be read",
    ),
    "Orbax without a tokenizer": (
        orbax_case(lambda f: (f / "tokenizer.model").unlink()),
        "has neither tokenizer.model nor tokenizer.json; download one of them",
    ),
    "several tokenizers": (
        orbax_case(
            lambda f: (
                [shutil.copy(f / "tokenizer.model", f / f"{name}.model") for name in ("one", "two")]
                and (f / "tokenizer.model").unlink()
            )
        ),
        "has several tokenizers, one.model, two.model; rename",
    ),
}
