"""Damaged and hostile checkpoints, each through the front door.

Every one gives a CheckpointError that names the file, the tensor where it concerns one, what is
wrong and what to do, in under a second; nothing is left behind and no code of theirs runs.  Headers
of GGUF files have a table of their own in test_gguf.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_nb.checkpoints import layout
from gemma_nb.checkpoints import load as front_door
from gemma_nb.errors import CheckpointError
from gemma_nb.model import GemmaTransformer
from tests.checkpoints import tiny, written

pytestmark = pytest.mark.usefixtures("cache", "no_compilation_cache")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
LINEAR = "model.layers.1.mlp.down_proj.weight"


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self):
        return os.mkdir, (str(self.where),)


def hf(folder: Path, **options) -> Path:
    return written.hugging_face(folder, written.params(), shards=1, **options)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


def raw_safetensors(path: Path, header: dict | bytes, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


# --- Hugging Face folders -------------------------------------------------------------------------


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


def truncate(path: Path, part: float) -> None:
    os.truncate(path, int(path.stat().st_size * part))


def set_nan(tensors: dict) -> None:
    tensors[LINEAR] = tensors[LINEAR].copy()
    tensors[LINEAR][3, 4] = np.nan


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


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

HUGGING_FACE: dict[str, tuple[Callable[[Path], Path], str]] = {
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
        "tokenizer.model: not a usable SentencePiece model .it is empty.",
    ),
    "tokenizer of 10 GB": (
        hf_case(lambda f: os.truncate(f / "tokenizer.model", 10 << 30)),
        "tokenizer.model has more than",
    ),
    "no tokenizer": (
        hf_case(lambda f: (f / "tokenizer.model").unlink()),
        "has no tokenizer.model; download that file",
    ),
    "tokenizer.json only": (
        hf_case(lambda f: (f / "tokenizer.model").rename(f / "tokenizer.json")),
        r"has no tokenizer.model \(tokenizer.json is another format",
    ),
    "tokenizer that is none": (
        hf_case(lambda f: (f / "tokenizer.model").write_bytes(b"\0" * 99)),
        r"tokenizer.model: not a usable SentencePiece model",
    ),
}


# --- Orbax folders --------------------------------------------------------------------------------


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

ORBAX: dict[str, tuple[Callable[[Path], Path], str]] = {
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
        r"embedder/input_embedding: expected shape \(276, 32\), got \(1099511627776, 32\)",
    ),
    "chunks of a huge size": (
        zarr_case(chunks=[1 << 40, 32]),
        r"embedder/input_embedding: chunks of \(1099511627776, 32\)",
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
        "has no tokenizer.model; download that file",
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


# --- files, and folders of something else ---------------------------------------------------------


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


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pickle file": (pickle_file, r"weights.gguf: a pickle file can run any code"),
    "torch file": (torch_file, r"gemma.ckpt: a pickle file can run any code"),
    "text": (file_case("model.gguf", b"hello world"), "this is not a GGUF file; pass the path"),
    "one safetensors file": (
        file_case("model.safetensors", b"\0" * 99),
        "is one file of a Hugging Face checkpoint; pass the path of its folder",
    ),
    "pipe": (pipe, "pipe.gguf: is a pipe; pass the path"),
    "pipe in a folder": (pipe_in_a_folder, "pipe.gguf is a pipe"),
    "array of objects": (objects, "weights.npy: .*this is not a GGUF file; pass the path"),
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
        gguf_case(lambda a: a.update({"output.weight": a["token_embd.weight"]})),
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
        split_case(lambda f: twice(f)),
        "tensor 'token_embd.weight' is in another file as well",
    ),
    "split GGUF renamed": (
        lambda f: split_case()(f).rename(f / "one.gguf"),
        "this is one of 2 files of a model",
    ),
}


def twice(folder: Path) -> None:
    arrays = {"token_embd.weight": np.ones((276, 32), np.float32)}
    fields = {**tiny.FIELDS, "split.no": 1, "split.count": 2, "split.tensors.count": 28}
    tiny.write(folder / "tiny-00002-of-00002.gguf", fields=fields, arrays=arrays)


CASES = {**HUGGING_FACE, **ORBAX, **FILES}


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
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as error:
        front_door.load_params(path, progress=False)
    seconds = time.perf_counter() - start
    said = str(error.value)
    assert str(tmp_path) in said
    assert REMEDY.search(said), said
    if ABOUT_ONE.search(name) and name not in ABOUT_SEVERAL:
        assert re.search(r"(tensor|parameter|field) '?[\w./]+", said), said
    assert seconds < 1
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
    flat = {**layout.flatten(written.params()), OLINEAR: value}
    if value is None:
        del flat[OLINEAR]
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
