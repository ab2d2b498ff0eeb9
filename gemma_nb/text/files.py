"""Contents of the files that make a tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """Contents of the files of a tokenizer; those that are not there are None or empty.

    Attributes:
      name: of the folder, for messages.
      model_name: of the SentencePiece model's file, for messages.
      model: the content of that file.
      json: of tokenizer.json.
      config: of tokenizer_config.json.
      added: of added_tokens.json.
      special: of special_tokens_map.json.
    """

    name: str
    model_name: str = ""
    model: bytes | None = None
    json: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    added: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    special: Mapping[str, Any] = dataclasses.field(default_factory=dict)
