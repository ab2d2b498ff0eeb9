"""What plots' tests look at: files as they are saved, and artists by what they stand for."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

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


def pixels(figure: Figure, dpi: float = 60.0) -> np.ndarray:
    """(height, width, 4) in 0 to 1, as drawn now."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()) / 255


def unreadable(figure: Figure, paper: float = 1.0) -> list[str]:
    """Labels whose contrast with the pixels behind them is below 3:1.

    Source of the ratio: WCAG 2.2.  `paper` is the grey of the page behind a transparent figure.
    """
    labels = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    for label in labels:
        label.set_alpha(0.0)
    behind = pixels(figure)
    for label in labels:
        label.set_alpha(None)
    inks = [(luminance(to_rgba(t.get_color())), t.get_window_extent()) for t in labels]
    found = []
    for label, (ink, box) in zip(labels, inks, strict=True):
        rows = slice(max(0, int(len(behind) - box.y1)), int(len(behind) - box.y0) + 1)
        part = behind[rows, max(0, int(box.x0)) : int(box.x1) + 1].reshape(-1, 4)
        if not len(part):
            continue  # outside of the picture: `overflows` sees that
        color = np.median(part, axis=0)
        back = luminance(color[3] * color + (1 - color[3]) * paper)
        ratio = (max(ink, back) + 0.05) / (min(ink, back) + 0.05)
        if ratio < 2.95:  # colours of eight bits
            found.append(f"{label.get_text()!r} with {ratio:.2f}:1")
    return found


def luminance(rgba) -> float:
    """Relative luminance; alpha is ignored."""
    rgb = np.asarray(rgba[:3], float)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
