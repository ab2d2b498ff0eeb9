"""What tests of panels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gemma_nb.widgets.chat import ChatPanel


@pytest.fixture
def panels() -> Iterator[list[ChatPanel]]:
    made: list[ChatPanel] = []
    yield made
    for panel in made:
        panel.close()
        panel._runner.close(10)
