"""Figures that show themselves in a notebook."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A matplotlib Figure made without pyplot, which a notebook shows all the same.

    pyplot keeps every figure alive and shows it once more at the end of the cell; a bare Figure is
    shown as text, unless pyplot was imported.
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
        return buffer.getvalue()
