"""Kinds of files that are not what their names say, by their first bytes, and what to do.

Git without Large File Storage leaves a pointer of three lines, a browser that is not logged in
saves a page, and downloads are cut off, packed, or of another program.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import NoReturn

from gemma_nb.errors import CheckpointError

_START = 1 << 12  # bytes that are looked at

_LFS = b"version https://git-lfs.github.com/spec/"
_XET = b"# xet version"
_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.I | re.S)
_XML = re.compile(rb"\s*<\?xml\b", re.I)
# What hubs answer in place of a file: as text, or as a JSON object with nothing but an error.
_ANSWER = re.compile(
    rb"\s*(\{\s*\"error\"\s*:|Entry not found|Repository not found|Invalid username or password"
    rb"|Access to model |Not Found|Unauthorized|Forbidden|404: Not Found|AccessDenied)",
)
_LOG_IN = (
    "accept the model's terms on its page and log in (hf auth login), then download the file again"
)
_UNPACK = "unpack it and pass the path of what is in it"
NO_PICKLES = (
    "a pickle file can run any code when it is opened, so gemma_nb never opens one; get the "
    "*.safetensors files of the same checkpoint, or convert it with transformers where you trust "
    "it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
)
_NO_READER = (
    "gemma_nb does not read it; get the *.safetensors files, a GGUF file or the Flax checkpoint of "
    "the same model"
)

# First bytes, where they are, what has them, and what to do.
_MAGIC: tuple[tuple[bytes, int, str, str], ...] = (
    (b"\x1f\x8b\x08", 0, "a gzip archive", _UNPACK),
    (b"ustar", 257, "a tar archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7-Zip archive", _UNPACK),
    (b"\xfd7zXZ\0", 0, "an xz archive", _UNPACK),
    (b"BZh", 0, "a bzip2 archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", 0, "a Zstandard archive", _UNPACK),
    (b"Rar!", 0, "a RAR archive", _UNPACK),
    (
        b"\x89HDF\r\n\x1a\n",
        0,
        "an HDF5 file, as Keras keeps weights (.h5, .weights.h5)",
        _NO_READER,
    ),
    (b"TFL3", 4, "a TensorFlow Lite model (.tflite, .task)", _NO_READER),
    (b"LITERTLM", 0, "a LiteRT-LM bundle (.litertlm)", _NO_READER),
    (b"\x93NUMPY", 0, "one array of numpy (.npy)", _NO_READER),
    (b"lmgg", 0, "a GGML file, which llama.cpp wrote before GGUF", "get a GGUF file of the model"),
    (b"tjgg", 0, "a GGJT file, which llama.cpp wrote before GGUF", "get a GGUF file of the model"),
    (b"fmgg", 0, "a GGMF file, which llama.cpp wrote before GGUF", "get a GGUF file of the model"),
    (
        b"algg",
        0,
        "a LoRA adapter of llama.cpp in its form before GGUF, without its base",
        "merge it into its base with llama.cpp's llama-export-lora, and load what that writes",
    ),
    (b"\x89PNG", 0, "a picture", "pass the path of a checkpoint"),
    (b"%PDF", 0, "a PDF document", "pass the path of a checkpoint"),
)
# What no first bytes tell.
_SUFFIXES = {
    ".onnx": ("an ONNX model", _NO_READER),
    ".onnx_data": ("the weights of an ONNX model", _NO_READER),
    ".tflite": ("a TensorFlow Lite model", _NO_READER),
    ".task": ("a MediaPipe bundle", _NO_READER),
    ".litertlm": ("a LiteRT-LM bundle", _NO_READER),
    ".h5": ("a Keras file of weights", _NO_READER),
    ".keras": ("a Keras model", _NO_READER),
    ".mlmodel": ("a Core ML model", _NO_READER),
    ".mlpackage": ("a Core ML model", _NO_READER),
    ".engine": ("a TensorRT engine", _NO_READER),
    ".msgpack": (
        "a Flax file of parameters in MessagePack",
        "read it with flax.serialization.msgpack_restore and pass the tree to "
        "gnb.GemmaTransformer.from_pretrained",
    ),
    ".npz": (
        "arrays of numpy or of MLX",
        "read them with numpy.load and pass a tree with the official names to "
        "gnb.GemmaTransformer.from_pretrained, or get the *.safetensors files of the same model",
    ),
}
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_PICKLE_STARTS = (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z", ".rar")
_HALF = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".opdownload")


def in_place_of_bytes(start: bytes, size: int) -> str:
    """A message about what stands where a file should be, and what to do; "" if it may be that.

    Args:
      start: its first bytes, some kilobytes.
      size: of the whole.
    """
    if not size:
        return "it is empty; download the file again"
    if start.startswith((_LFS, _XET)):
        return (
            f"it is a pointer of Git LFS, not the file itself{_size_of_pointer(start)}; fetch the "
            "file with: git lfs install && git lfs pull, or download it from the hub"
        )
    if _PAGE.match(start) or _XML.match(start):
        return f"it is a page of a web site, not the file itself{_title(start)}; {_LOG_IN}"
    if size < _START and _ANSWER.match(start) and _is_answer(start):
        said = " ".join(start.decode("utf-8", "replace").split())
        return f"it is the answer of a hub, not the file itself ({said:.120}); {_LOG_IN}"
    if size > 1024 and not start.strip(b"\0"):
        return "it begins with nothing but zeros: its download was not finished; download it again"
    return ""


def in_place_of(path: Path) -> str:
    """The same of a file; "" also where it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return in_place_of_bytes(file.read(_START), os.fstat(file.fileno()).st_size)
    return ""


def of_bytes(start: bytes, size: int) -> str:
    """A message about a file that is none of a checkpoint; otherwise like `in_place_of_bytes`."""
    if found := in_place_of_bytes(start, size):
        return found
    for magic, at, what, remedy in _MAGIC:
        if start[at : at + len(magic)] == magic:
            return f"it is {what}; {remedy}"
    if start.startswith(b"PK\3\4"):
        return _of_zip(start)
    if start.startswith(_PICKLE_STARTS):
        return f"it is a pickle; {NO_PICKLES}"
    return ""


def of_file(path: Path) -> str:
    """The same of a file, by its name as well; "" also where it cannot be read.

    What a file holds counts more than what it is called.
    """
    name = path.name.lower()
    with contextlib.suppress(OSError), open(path, "rb") as file:
        found = of_bytes(file.read(_START), os.fstat(file.fileno()).st_size)
        if found:
            return found
    if name.endswith(_HALF):
        return "it is a download that was not finished; download the file again"
    for suffix, (what, remedy) in _SUFFIXES.items():
        if name.endswith(suffix):
            return f"it is {what}; {remedy}"
    return f"it is a pickle; {NO_PICKLES}" if is_pickle_name(name) else ""


def may_be_of_a_model(name: str) -> bool:
    """True where a file is called as weights are, or an archive of some."""
    suffix = Path(name).suffix.lower()
    return suffix in {*_SUFFIXES, *_PICKLES, *_HALF, *_ARCHIVES, ".gguf"}


def is_pickle_name(name: str) -> bool:
    """True where a file is called as what only `pickle` can read."""
    return Path(name).suffix.lower() in _PICKLES


def refuse(path: Path) -> None:
    """Raise CheckpointError over a file that is said to be something else."""
    if found := of_file(path):
        _refuse(path, found)


def refuse_bytes(raw: bytes, what: object) -> None:
    """The same of what was read of a file."""
    if found := of_bytes(raw[:_START], len(raw)):
        _refuse(what, found)


def _refuse(what: object, found: str) -> NoReturn:
    raise CheckpointError(f"{what}: {found}")


def in_folder(folder: Path) -> str:
    """The first file of a folder, at any depth, that is not what it should be, and what it is.

    An empty file may be meant to be.
    """
    for at, below, files in os.walk(folder):
        below.sort()
        for path in (Path(at, name) for name in sorted(files)):
            found = in_place_of(path)
            if found and path.stat().st_size:
                return f"{path}: {found}"
    return ""


def unfinished(folder: Path) -> str:
    """A message about what was not downloaded to its end in a folder: "" if nothing tells."""
    # Where a browser, and where `hf download --local-dir` keeps what it has of a file.
    for at in (folder, folder / ".cache" / "huggingface" / "download"):
        with contextlib.suppress(OSError):
            for path in sorted(at.iterdir()):
                if path.name.lower().endswith(_HALF):
                    return f"{path} was not downloaded to its end: download the checkpoint again"
    return ""


def _of_zip(start: bytes) -> str:
    """A zip archive by the name of its first member."""
    length = int.from_bytes(start[26:28], "little")
    first = start[30 : 30 + length].decode("utf-8", "replace")
    if first.endswith(".npy"):
        what, remedy = _SUFFIXES[".npz"]
        return f"it is {what}; {remedy}"
    if first.endswith(("data.pkl", "/version", "byteorder", ".storage_alignment")):
        return f"it is a file of torch, a pickle in a zip archive; {NO_PICKLES}"
    return f"it is a zip archive, which may hold a pickle; {_UNPACK}; {NO_PICKLES}"


def _size_of_pointer(start: bytes) -> str:
    size = re.search(rb"^size (\d+)$", start, re.M)
    return f" of {int(size[1]):,} bytes" if size and len(size[1]) < 16 else ""


def _title(start: bytes) -> str:
    title = re.search(rb"<title[^>]*>(.*?)</title>", start, re.I | re.S)
    text = " ".join(title[1].decode("utf-8", "replace").split()) if title else ""
    return f' ("{text:.80}")' if text else ""


def _is_answer(start: bytes) -> bool:
    """True where a JSON object tells of nothing but an error; text does."""
    if not start.lstrip().startswith(b"{"):
        return True
    try:
        fields = json.loads(start)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.keys() <= {"error", "message", "statusCode", "code"}
