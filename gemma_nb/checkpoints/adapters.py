"""Adapters, which are changes to a model and none themselves: said so, and what their base is."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from gemma_nb.checkpoints import folders
from gemma_nb.errors import CheckpointError

_CONFIG = "adapter_config.json"  # of the library peft, as are the names of the files
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
_MERGE = (
    "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
    ".save_pretrained(new_folder)"
)


def refuse(folder: Path) -> None:
    """Raise CheckpointError where a folder holds an adapter, of which nothing would be used."""
    about = folder / _CONFIG
    weights = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if not about.exists() and weights is None:
        return
    if any(folder.glob("model*.safetensors")) and (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} holds a whole model and an adapter ({(weights or about).name}); remove what "
            "is called adapter* to load the model without it, or merge the two with peft first: "
            f"{_MERGE}"
        )
    _refuse(str(folder), _base(folder), f"merge the two with peft and load that: {_MERGE}")


def refuse_file(path: Path) -> None:
    """The same of one file."""
    if path.name in _WEIGHTS:
        refuse(path.parent)


def refuse_gguf(metadata: Mapping[str, Any], name: str) -> None:
    """The same of the metadata of a GGUF file."""
    if metadata.get("general.type") != "adapter":
        return
    base = ""
    for key in ("general.base_model.0.repo_url", "general.base_model.0.name"):
        base = base or str(metadata.get(key) or "")
    _refuse(name, base, "merge the two with llama.cpp's llama-export-lora and load that")


def _base(folder: Path) -> str:
    with contextlib.suppress(CheckpointError):
        return str(folders.read_json(folder, _CONFIG).get("base_model_name_or_path") or "")
    return ""


def _refuse(what: str, base: str, remedy: str) -> NoReturn:
    of = f"of {base!r:.200}" if base else "of a base that it does not name"
    raise CheckpointError(f"{what}: this is an adapter {of}, without that model; {remedy}")
