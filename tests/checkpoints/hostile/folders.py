"""Hugging Face folders."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from gemma_nb.checkpoints import layout
from tests.checkpoints import tiny, written
from tests.checkpoints.hostile.damage import (
    Bomb,
    Case,
    edit_json,
    edit_tensors,
    fifo,
    hf,
    raw_safetensors,
    truncate,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
LINEAR = "model.layers.1.mlp.down_proj.weight"


def hf_case(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        hf(folder)
        change(folder)
        return folder

    return write


def sharded_case(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        written.hugging_face(folder, written.params())
        change(folder)
        return folder

    return write


def tensors_case(change: Callable[[dict], object]) -> Callable[[Path], Path]:
    return hf_case(lambda folder: edit_tensors(folder / SINGLE, change))


def config_case(**fields: object) -> Callable[[Path], Path]:
    return hf_case(lambda folder: edit_json(folder / "config.json", lambda c: c.update(fields)))


def header_case(header: dict | bytes, data: bytes = b"") -> Callable[[Path], Path]:
    return hf_case(lambda folder: raw_safetensors(folder / SINGLE, header, data))


def index_case(change: Callable[[dict], object]) -> Callable[[Path], Path]:
    return sharded_case(lambda folder: edit_json(folder / INDEX, change))


def set_nan(tensors: dict) -> None:
    tensors[LINEAR] = tensors[LINEAR].copy()
    tensors[LINEAR][3, 4] = np.nan


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def second_copy(folder: Path) -> None:
    """One tensor in both shards; the index knows of one."""
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    edit_tensors(second, lambda tensors: tensors.update({EMBEDDING: load_file(first)[EMBEDDING]}))


def link_out(folder: Path) -> None:
    outside = folder.with_name("outside.safetensors")
    shutil.move(folder / SINGLE, outside)
    (folder / SINGLE).symlink_to(outside)


def only_pickles(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "ran")))


def pickled_index(folder: Path) -> None:
    (folder / "evil.bin").write_bytes(pickle.dumps(Bomb(folder / "ran")))
    where = dict.fromkeys(layout.to_hf(written.params(), tiny.CONFIG), "evil.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
OVERLAP = {"a": F32, "b": {**F32, "data_offsets": [4, 12]}}
HUGE = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
OVERFLOW = {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}}

CASES: dict[str, Case] = {
    "cut off": (
        hf_case(lambda f: truncate(f / SINGLE, 0.5)),
        r"model\.safetensors: no valid .*tensor '[\w.]+' ends at byte [\d,]+, the file has",
    ),
    "cut in its header": (
        hf_case(lambda f: truncate(f / SINGLE, 0.001)),
        r"model\.safetensors: no valid",
    ),
    "empty": (hf_case(lambda f: (f / SINGLE).write_bytes(b"")), r"model\.safetensors"),
    "wrong magic": (
        hf_case(lambda f: (f / SINGLE).write_bytes(b"GGUF" * 99)),
        r"model\.safetensors: no valid",
    ),
    "header that is no JSON": (header_case(b"{]" * 8), r"model\.safetensors: no valid"),
    "header of a huge size": (
        hf_case(lambda f: (f / SINGLE).write_bytes(struct.pack("<Q", 1 << 63) + b"{}")),
        r"model\.safetensors: no valid",
    ),
    "tensor of a huge size": (
        header_case(HUGE, b"\0" * 8),
        r"model\.safetensors: no valid .*tensor 'a' ends at byte 4,398,046,511,104, the file has 8",
    ),
    "size that overflows": (
        header_case(OVERFLOW, b"\0" * 8),
        r"model\.safetensors: no valid .*tensor 'a': F32 of shape \[4611686018427387904, ",
    ),
    "overlapping tensors": (
        header_case(OVERLAP, b"\0" * 12),
        r"model\.safetensors: no valid .*tensor 'b' starts at byte 4, the one before ends at 8",
    ),
    "negative sizes": (
        header_case({"a": {**F32, "shape": [-2]}}, b"\0" * 8),
        "tensor 'a': expected whole numbers as shape",
    ),
    "a tensor without a place": (header_case({"a": {}}), "tensor 'a': expected a dtype, a shape"),
    "missing tensor": (
        tensors_case(lambda t: t.pop(LINEAR)),
        rf"tensor '{LINEAR}' is missing; .*download",
    ),
    "foreign tensor": (
        tensors_case(lambda t: t.update({"model.layers.0.lora_A.weight": np.ones(3)})),
        r"'model.layers.0.lora_A.weight' belongs to no Gemma .* merged",
    ),
    "wrong shape": (
        tensors_case(lambda t: t.update({LINEAR: np.ones((3, 4), np.float32)})),
        rf"tensor '{LINEAR}': expected shape \(32, 64\) from config.json, got \(3, 4\)",
    ),
    "scalar instead of a vector": (
        tensors_case(lambda t: t.update({"model.norm.weight": np.array(1, np.float32)})),
        r"tensor 'model.norm.weight': expected shape \(32,\)",
    ),
    "integers": (
        tensors_case(lambda t: t.update({LINEAR: np.ones((32, 64), np.int8)})),
        rf"tensor '{LINEAR}': expected one of .*, got I8; .* not quantised",
    ),
    "NaN": (tensors_case(set_nan), "layer_1/mlp/linear holds NaN or infinity; .*download"),
    "a head of its own": (
        tensors_case(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
        r"tensor 'lm_head.weight' differs from the embedding",
    ),
    "the same parameter twice": (
        tensors_case(lambda t: t.update({f"language_model.{LINEAR}": t[LINEAR]})),
        "are the same parameter",
    ),
    "no config": (hf_case(lambda f: (f / "config.json").unlink()), r"config\.json is missing"),
    "config that is no JSON": (
        hf_case(lambda f: (f / "config.json").write_text("{")),
        r"config\.json is not JSON .*; download",
    ),
    "config nested too deep": (
        hf_case(lambda f: (f / "config.json").write_text("[" * 200_000)),
        r"config\.json is not JSON",
    ),
    "config nested a little too deep": (
        config_case(extra=json.loads("[" * 100 + "]" * 100)),
        r"config\.json is not JSON .nested more than 64 deep",
    ),
    "header nested too deep": (
        header_case(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        r"model\.safetensors: no valid",
    ),
    "index nested too deep": (
        sharded_case(lambda f: (f / INDEX).write_text("[" * 200_000)),
        r"index\.json is not JSON",
    ),
    "config that is a list": (
        hf_case(lambda f: (f / "config.json").write_text("[]")),
        r"config\.json: expected a JSON object, got list",
    ),
    "another architecture": (
        config_case(model_type="llama"),
        r"config\.json: model_type 'llama' is not supported",
    ),
    "Gemma 3n": (config_case(model_type="gemma3n"), "'gemma3n' is not supported; .* 3n and 4 are"),
    "Gemma 4": (config_case(model_type="gemma4"), "'gemma4' is not supported; .* 3n and 4 are not"),
    "huge declared size": (config_case(hidden_size=1 << 30), r"expected shape \(276, 1073741824\)"),
    "nonsense size": (config_case(hidden_size=-1), "field 'hidden_size' .* whole number"),
    "quantised": (
        config_case(quantization_config={"bits": 4}),
        r"config\.json: quantised weights, .* a GGUF file",
    ),
    "missing shard": (
        sharded_case(lambda f: (f / "model-00002-of-00002.safetensors").unlink()),
        r"model-00002-of-00002.safetensors is missing; .*download",
    ),
    "index that is a lie": (
        index_case(lambda i: i["weight_map"].update(ghost="model-00001-of-00002.safetensors")),
        r"model-00001-of-00002.safetensors: tensor 'ghost' is missing",
    ),
    "index without a map": (index_case(lambda i: i.pop("weight_map")), "expected a weight_map"),
    "index that leads out": (
        index_case(lambda i: i["weight_map"].update({LINEAR: "../../secret.safetensors"})),
        r"index.json: '../../secret.safetensors' is no file of this folder",
    ),
    "index to a device": (
        index_case(lambda i: i["weight_map"].update({LINEAR: "/dev/zero"})),
        r"index.json: '/dev/zero' is no file of this folder",
    ),
    "shards without an index": (
        sharded_case(lambda f: (f / INDEX).unlink()),
        r"has 2 \*.safetensors files and no model.safetensors.index.json; download",
    ),
    "link out of the folder": (hf_case(link_out), "leads out of its folder, to .*outside"),
    "pickles only": (hf_case(only_pickles), r"pytorch_model.bin: a pickle file can run any code"),
    "index of pickles": (hf_case(pickled_index), r"evil.bin: a pickle file can run any code"),
    "pipe for a config": (hf_case(lambda f: fifo(f / "config.json")), "config.json is a pipe"),
    "pipe for weights": (hf_case(lambda f: fifo(f / SINGLE)), f"{SINGLE} is a pipe"),
    "pipe for a tokenizer": (
        hf_case(lambda f: fifo(f / "tokenizer.model")),
        "tokenizer.model is a pipe",
    ),
    "folder for a config": (hf_case(lambda f: a_folder(f / "config.json")), "is a folder"),
    "folder for weights": (hf_case(lambda f: a_folder(f / SINGLE)), f"{SINGLE} is a folder"),
    "link to a device": (
        hf_case(lambda f: link_to(f / SINGLE, "/dev/zero")),
        "leads out of its folder, to /dev/zero",
    ),
    "link to itself": (hf_case(lambda f: link_to(f / SINGLE, SINGLE)), f"cannot read .*{SINGLE}"),
    "link to nothing": (hf_case(lambda f: link_to(f / SINGLE, "x")), f"{SINGLE} is missing"),
    "zip for weights": (
        hf_case(lambda f: (f / SINGLE).write_bytes(b"PK\3\4" * 99)),
        "a pickle file can run any code",
    ),
    "config with a field twice": (
        hf_case(lambda f: (f / "config.json").write_text('{"hidden_size": 32, "hidden_size": 64}')),
        "config.json is not JSON .'hidden_size' is there twice.",
    ),
    "config of 5000 digits": (
        hf_case(lambda f: (f / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}")),
        "config.json is not JSON",
    ),
    "config of NaN": (config_case(rms_norm_eps=float("nan")), "'rms_norm_eps' .*got nan"),
    "config of a billion layers": (config_case(num_hidden_layers=10**9), "'num_hidden_layers'"),
    "config of 10 GB": (
        hf_case(lambda f: os.truncate(f / "config.json", 10 << 30)),
        "config.json has more than",
    ),
    "config with code": (
        config_case(model_type="evil", auto_map={"AutoModel": "evil.Model"}),
        "model_type 'evil' is not supported",
    ),
    "tensor in two shards": (
        sharded_case(second_copy),
        rf"00002.safetensors: tensor '{EMBEDDING}' is in this file, which .* is in model-00001",
    ),
    "tensor that no index lists": (
        sharded_case(
            lambda f: edit_tensors(
                f / "model-00002-of-00002.safetensors", lambda t: t.update(extra=np.ones(3))
            )
        ),
        "tensor 'extra' is in this file, which no index lists",
    ),
    "index with a name of a file that cannot be": (
        index_case(lambda i: i["weight_map"].update({LINEAR: "a\0b.safetensors"})),
        "cannot read",
    ),
    "dtype that nobody knows": (
        header_case({LINEAR: {**F32, "dtype": "Q9"}}, b"\0" * 8),
        f"tensor '{LINEAR}': unknown dtype 'Q9'",
    ),
    "100,000 tensors": (
        header_case({f"t{i}": {**F32, "shape": [0], "data_offsets": [0, 0]} for i in range(10**5)}),
        "100,000 tensors, expected at most",
    ),
    "empty tokenizer": (
        hf_case(lambda f: (f / "tokenizer.model").write_bytes(b"")),
        "tokenizer.model: it is empty; download",
    ),
    "tokenizer of 10 GB": (
        hf_case(lambda f: os.truncate(f / "tokenizer.model", 10 << 30)),
        "tokenizer.model has more than",
    ),
    "no tokenizer": (
        hf_case(lambda f: (f / "tokenizer.model").unlink()),
        "has neither tokenizer.model nor tokenizer.json; download one of them",
    ),
    "tokenizer.model named tokenizer.json": (
        hf_case(lambda f: (f / "tokenizer.model").rename(f / "tokenizer.json")),
        r"tokenizer.json is not JSON",
    ),
    "tokenizer that is none": (
        hf_case(lambda f: (f / "tokenizer.model").write_bytes(b"\0" * 99)),
        r"tokenizer.model: not a usable SentencePiece model",
    ),
}
