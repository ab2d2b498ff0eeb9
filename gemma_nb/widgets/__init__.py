"""The panels of the notebook: `ChatPanel` and `AttentionPanel`, imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "ChatPanel": "gemma_nb.widgets.chat",
    "AttentionPanel": "gemma_nb.widgets.attention",
}

__all__ = ["AttentionPanel", "ChatPanel"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gemma_nb.widgets' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from gemma_nb.widgets.attention import AttentionPanel
    from gemma_nb.widgets.chat import ChatPanel
