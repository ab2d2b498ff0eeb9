"""What plots' tests look at: files as they are saved, and artists by what they stand for."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# An image in a vector file: 650 cells squared, and a colour bar, with room to spare.
MOST_BYTES = 3_000_000


def save(figure: Figure) -> dict[str, bytes]:
    """PNG, SVG and PDF of a figure, drawn without any warning: a missing glyph is one."""
    files = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("png", "svg", "pdf"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind)
            files[kind] = buffer.getvalue()
    assert files["png"].startswith(b"\x89PNG")
    assert files["pdf"].startswith(b"%PDF")
    assert max(map(len, files.values())) < MOST_BYTES
    return files


def embedded_images(svg: bytes) -> list[tuple[float, float]]:
    """Width and height of each raster image in an SVG, as it was stored."""
    tags = re.findall(rb"<image [^>]*>", svg)
    sizes = (re.search(rb'width="([\d.]+)" height="([\d.]+)"|height="([\d.]+)"', t) for t in tags)
    return [tuple(float(x) for x in m.groups() if x) for m in sizes if m]  # type: ignore[misc]


def texts(figure: Figure) -> str:
    """Everything written in a figure."""
    from matplotlib.text import Text

    return "\n".join(t.get_text() for t in figure.findobj(Text) if t.get_visible())


def notes(ax: Axes) -> str:
    """What stands below the axes, on one line."""
    legend = ax.get_legend()
    lines = [] if legend is None else [t.get_text() for t in legend.get_texts()]
    return " | ".join(line.replace("\n", " ") for line in lines)


def drawn(ax: Axes) -> np.ma.MaskedArray:
    """The numbers behind the colours of an image; of vector cells, those that are visible."""
    return next(a for a in [*ax.images, *ax.collections] if a.get_array() is not None).get_array()


def area(patch) -> float:
    """Of a polygon."""
    x, y = patch.get_xy().T
    return abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2


def overflows(figure: Figure) -> list[str]:
    """The sides at which something sticks out of the figure by more than a hair."""
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    beyond = {
        "left": -box.x0,
        "bottom": -box.y0,
        "right": box.x1 - width,
        "top": box.y1 - height,
    }
    return [f"{side} by {by:.2f} inches" for side, by in beyond.items() if by > 0.03]


def written(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def bar_of(ax):
    """What a colour bar is drawn with: its colours and its scale."""
    return next(c for c in ax.child_axes[0].collections if c.get_array() is not None)


def largest_of_each(values: np.ndarray, block: int, center: float = -np.inf) -> np.ndarray:
    """(T, C) by blocks of rows, the value farthest from the center."""
    far = np.abs(values - center) if np.isfinite(center) else values
    rows = far.reshape(-1, block, values.shape[1]).argmax(1)
    return np.take_along_axis(values.reshape(-1, block, values.shape[1]), rows[:, None], 1)[:, 0]
