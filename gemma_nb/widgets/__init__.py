"""The panels of the notebook: `ChatPanel` and `AttentionPanel`, imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_nb.lazy import attach

_PUBLIC = {
    "ChatPanel": "gemma_nb.widgets.chat",
    "AttentionPanel": "gemma_nb.widgets.attention",
}

__all__ = ["AttentionPanel", "ChatPanel"]
__getattr__, __dir__ = attach(__name__, globals(), _PUBLIC)

if TYPE_CHECKING:
    from gemma_nb.widgets.attention import AttentionPanel
    from gemma_nb.widgets.chat import ChatPanel
