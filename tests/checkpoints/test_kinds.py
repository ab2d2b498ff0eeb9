"""Files that are not what they are called: one message says what they are, and what to do."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.checkpoints import load as front_door
from gemma_nb.checkpoints import sources
from gemma_nb.errors import CheckpointError, ConversationError
from tests.checkpoints import tiny, written

pytestmark = pytest.mark.usefixtures("cache", "no_compilation_cache")

# As `git clone` leaves it without Git LFS (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)
# and as a browser saves it that is not logged in.
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 536870912\n"
)
PAGE = b"<!DOCTYPE html>\n<html><head><title>Log In\n  - Hugging Face</title></head></html>"
ANSWER = b'{"error":"Access to model google/gemma-3-1b-it is restricted"}'
SAYS = {
    "pointer": (POINTER, "pointer of Git LFS, not the file itself.*git lfs pull"),
    "page": (PAGE, r"page of a web site.*Log In - Hugging Face.*log in.*download"),
    "answer": (ANSWER, "answer of a hub.*is restricted.*log in.*download"),
}

Write = Callable[..., Path]
ARRAY = "transformer/embedder.input_embedding"
PLACES: list[tuple[Write, str]] = [
    (written.gguf_file, "tiny.gguf"),
    (written.gguf_split, "tiny-00002-of-00002.gguf"),
    (written.hugging_face, "config.json"),
    (written.hugging_face, "tokenizer.model"),
    (written.hugging_face, "model.safetensors.index.json"),
    (written.hugging_face, "model-00001-of-00002.safetensors"),
    (written.orbax_flat, "_METADATA"),
    (written.orbax_flat, "manifest.ocdbt"),
    (written.orbax_zarr, f"{ARRAY}/.zarray"),
    (written.orbax_zarr, f"{ARRAY}/0.0"),
]


@pytest.mark.parametrize("kind", SAYS)
@pytest.mark.parametrize(("write", "name"), PLACES, ids=lambda x: x if isinstance(x, str) else "")
def test_what_stands_in_place_of_a_file_is_said(write, name, kind, tmp_path):
    if kind == "answer" and name in ("manifest.ocdbt", f"{ARRAY}/0.0"):
        pytest.skip("hubs answer for what is downloaded by itself")
    path = write(tmp_path / "x", written.params())
    content, said = SAYS[kind]
    ((tmp_path / "x") / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.compile(said, re.S)) as error:
        front_door.load_params(path, progress=False)
    assert name.rpartition("/")[2] in str(error.value)


def packed(start: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(start, b"x")
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("gemma"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.gguf", b"", "it is empty; download"),
        ("a.gguf", bytes(5000), "nothing but zeros: its download was not finished"),
        ("a.gguf.part", b"GGUF", "a download that was not finished"),
        ("Unconfirmed.crdownload", b"GGUF", "a download that was not finished"),
        ("a.gguf", gzip.compress(b"GGUF", mtime=0), "a gzip archive; unpack it"),
        ("a.tar", tar(), "a tar archive; unpack it"),
        ("a.gguf", packed("gemma/config.json"), "a zip archive.*unpack it"),
        ("a.bin", packed("archive/data.pkl"), "a file of torch, a pickle"),
        ("a.gguf", pickle.dumps([1]), "a pickle file can run any code"),
        ("weights.npz", packed("layers.0.npy"), "of numpy or of MLX; .*from_pretrained"),
        ("flax_model.msgpack", b"\x81\xa6params\x80", "MessagePack; .*msgpack_restore.*from_pre"),
        ("model.onnx", b"\x08\x07", "an ONNX model; .*get the"),
        ("gemma.task", b"\x1c\0\0\0TFL3", "TensorFlow Lite.*get the"),
        ("gemma.litertlm", b"LITERTLM", "a LiteRT-LM bundle"),
        ("gemma.weights.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras"),
        ("gemma.gguf", b"tjgg\1\0\0\0", "before GGUF; get a GGUF file"),
        ("lora.gguf", b"algg\1\0\0\0", "a LoRA adapter of llama.cpp .*merge it into its base"),
        ("talk.gnb", packed("conversation.json"), "conversation.* gnb.ChatSession.load"),
        ("readme.md", b"# Gemma", "expected b'GGUF', got b'# Ge': this is not a GGUF file"),
    ],
)
def test_a_file_of_another_kind_is_said_to_be_that(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as error:
        front_door.load_params(tmp_path / name, progress=False)
    assert name in str(error.value)


@pytest.mark.parametrize("left", ["model-2.part", ".cache/huggingface/download/abc.incomplete"])
def test_what_a_download_left_says_why_a_file_is_missing(left, tmp_path):
    folder = written.hugging_face(tmp_path, written.params())
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / left).parent.mkdir(parents=True, exist_ok=True)
    (folder / left).write_bytes(b"x")
    said = rf"00002.safetensors is missing; .*{left} was not downloaded to its end"
    with pytest.raises(CheckpointError, match=said):
        front_door.load_params(folder, progress=False)


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_names_its_base(weights, tmp_path):
    """As `PeftModel.save_pretrained` writes it, often with the tokenizer beside it."""
    about = {"base_model_name_or_path": "google/gemma-3-1b-it", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    (tmp_path / weights).write_bytes(b"x")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    for path in (tmp_path, tmp_path / weights):
        with pytest.raises(CheckpointError, match=r"an adapter of 'google/gemma-3-1b-it', w.*peft"):
            sources.resolve(path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="adapter of a base that it does not name"):
        sources.resolve(tmp_path)


def test_a_model_with_an_adapter_beside_it_is_neither(tmp_path):
    folder = written.hugging_face(tmp_path, written.params())
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a whole model and an adapter .adapter_config.json"):
        sources.resolve(folder)


def test_an_adapter_in_a_gguf_file_names_its_base(tmp_path):
    """As llama.cpp's convert_lora_to_gguf.py writes it."""
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "gemma3")
    writer.add_type("adapter")
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/google/gemma-3-1b")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"an adapter of 'https://.*gemma-3-1b', without"):
        front_door.load_params(tmp_path / "lora.gguf", progress=False)


# --- one folder too high or too low ---------------------------------------------------------------


def test_a_folder_too_high_or_too_low_says_where_the_checkpoint_is(tmp_path):
    flax = written.orbax_flat(tmp_path / "models" / "flax" / "tiny", written.params())
    hf = written.hugging_face(tmp_path / "hub" / "snapshots" / "abc", written.params())
    (hf / "images").mkdir()
    for path, where in {
        tmp_path / "models": flax,
        flax / "d": flax,
        flax / "ocdbt.process_0" / "d": flax,
        tmp_path / "hub": hf,
        hf / "images": hf,
    }.items():
        with pytest.raises(CheckpointError, match=re.escape(str(where))):
            sources.resolve(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint; pass the path of a GGUF file"):
        sources.resolve(tmp_path / "empty")
    (tmp_path / "empty" / "gemma.task").write_bytes(b"\x1c\0\0\0TFL3")
    with pytest.raises(CheckpointError, match=r"its file gemma.task: it is a TensorFlow Lite"):
        sources.resolve(tmp_path / "empty")


# --- what is no checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize("content", [POINTER, PAGE])
def test_other_files_are_said_to_be_that_as_well(content, tmp_path, tiny_model):
    said = "pointer of Git LFS" if content == POINTER else "page of a web site"
    (tmp_path / "talk.gnb").write_bytes(content)
    with pytest.raises(ConversationError, match=said):
        gnb.ChatSession.load(tmp_path / "talk.gnb", *tiny_model)
    for name in ("sae.npz", "sae.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=said):
            gnb.SparseAutoencoder.load(tmp_path / name, site="residual", layer=0)
    (tmp_path / "trace.nc").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        gnb.Trace.load(tmp_path / "trace.nc")


def test_what_is_whole_is_none_of_these(tmp_path):
    assert (
        front_door.load_params(written.gguf_file(tmp_path, written.params()), progress=False)[0]
        == tiny.CONFIG
    )
