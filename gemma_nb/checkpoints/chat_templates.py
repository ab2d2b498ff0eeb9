"""The chat templates that come with a checkpoint: in files of its folder, or fields of a GGUF file.

Only texts are read here; whether they can be followed matters when one is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_nb.checkpoints import folders
from gemma_nb.errors import CheckpointError
from gemma_nb.presets import ChatTemplates

_DEFAULT, _FIELD = "default", "chat_template"
_TEXT, _LEGACY, _CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
_MORE = "additional_chat_templates"
_TOKENS = "special_tokens_map.json"
_GGUF = "tokenizer.chat_template"


def of_folder(folder: Path) -> ChatTemplates | None:
    """Chat templates of a Hugging Face folder, as transformers finds them; None: it has none.

    Files of their own go before fields of other files.

    Raises:
      CheckpointError: a file cannot be read, or has something else in the place of a template.
    """
    sources = dict(_files(folder))
    for name in (_LEGACY, _CONFIG):
        if not sources and (folder / name).exists():
            sources = _named(folders.read_json(folder, name).get(_FIELD), f"{folder / name}")
    if not sources:
        return None
    config = folders.read_json(folder, _CONFIG) if (folder / _CONFIG).exists() else {}
    more = folders.read_json(folder, _TOKENS) if (folder / _TOKENS).exists() else {}
    tokens = {**dict(_tokens(more)), **dict(_tokens(config))}
    return ChatTemplates(
        tuple(sources.items()), tuple(tokens.items()), config.get("add_bos_token") is not False
    )


def of_gguf(metadata: Mapping[str, Any]) -> ChatTemplates | None:
    """Chat templates of a GGUF file, where llama.cpp's converter puts them; None: it has none."""
    sources = {}
    for key, value in metadata.items():
        ours = key == _GGUF or key.startswith(f"{_GGUF}.")
        if ours and isinstance(value, str) and value:
            sources[key[len(_GGUF) + 1 :] or _DEFAULT] = value
    if not sources:
        return None
    add_bos = metadata.get("tokenizer.ggml.add_bos_token") is not False
    return ChatTemplates(tuple(sources.items()), add_bos=add_bos)


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    if (folder / _TEXT).exists():
        yield _DEFAULT, folders.text(folder, _TEXT)
    for path in sorted((folder / _MORE).glob("*.jinja")):
        yield path.stem, folders.text(folder, str(path.relative_to(folder)))


def _named(field: Any, where: str) -> dict[str, str]:
    """A template, or a list of named ones, by name."""
    if not field:
        return {}
    named = field if isinstance(field, list) else [{"name": _DEFAULT, "template": field}]
    found = {}
    for item in named:
        entry = item if isinstance(item, dict) else {}
        name, text = entry.get("name"), entry.get("template")
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(
                f'{where}: expected "{_FIELD}" to be a text, or a list of names and templates, got '
                f"{field!r:.60}; download the file again"
            )
        found[name] = text
    return found


def _tokens(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Texts of special tokens, by name; some files say more of a token than its text."""
    for name, value in fields.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            yield name, text
