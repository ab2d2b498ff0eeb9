"""Head statistics: every head a point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from gemma_nb.interp import heads
from gemma_nb.plots.colors import FAINT, GLOBAL, INK, LOCAL
from gemma_nb.plots.figure import SMALL, canvas, footer, headline, inches, picture
from gemma_nb.plots.ink import Ink
from gemma_nb.plots.maps import computed_under, window_of
from gemma_nb.plots.sources import values_of

if TYPE_CHECKING:
    import xarray

    from gemma_nb.interp.trace import Trace

_LABELS = {
    "previous_token": "weight on the previous token",
    "bos_sink": "weight on position 0",
    "local": "weight on nearby tokens",
    "entropy": "entropy of the rows (nats)",
    "induction": "weight on what followed this token before",
}


@picture
def head_statistics(
    statistics: xarray.Dataset | Trace,
    x: str = "previous_token",
    y: str = "induction",
    *,
    most: int = 6,
    ax: Axes | None = None,
) -> Axes:
    """Every head as a point, by two of its statistics; the most extreme ones are named.

    Args:
      statistics: of `gnb.head_statistics` or `gnb.head_scores`: values (layer, head); or the trace
        to take them of.
      x: statistic along the horizontal axis.
      y: along the vertical axis.
      most: how many heads are named, from the top of each axis; L5.H2 is head 2 of layer 5.
      ax: where to draw; None makes a figure.

    Returns:
      The figure; with `ax`, the axes.

    Raises:
      TypeError: another kind of source or axes.
      ValueError: an unknown statistic, or one that is not known for any head (induction, on a text
        that repeats nothing).
    """
    statistics = values_of(statistics, heads.head_statistics)
    for name in (x, y):
        if name not in statistics:
            known = ", ".join(map(repr, map(str, statistics.data_vars)))
            raise ValueError(f"no statistic {name!r} is here; there are {known}")
        if not np.isfinite(statistics[name].values).any():
            raise ValueError(
                f"{name!r} is not known for this text; gnb.head_scores(model) measures it on "
                "repeated random tokens"
            )
    across = statistics[x].transpose("layer", "head").values
    up = statistics[y].transpose("layer", "head").values
    ax = canvas(ax, 3.4, 3.4, left=0.6, right=0.3, bottom=0.45)
    kinds = [str(k) for k in statistics["layer_kind"].values]
    local = np.array([window_of(kind) is not None for kind in kinds])
    for rows, marker, color, name in (
        (local, "o", LOCAL, "head of a local layer"),
        (~local, "D", GLOBAL, "head of a global layer"),
    ):
        if rows.any():
            ax.scatter(
                across[rows].ravel(),
                up[rows].ravel(),
                s=18,
                marker=marker,
                color=color,
                alpha=0.75,
                linewidths=0,
                label=name,
            )
    ax.margins(0.1)
    for name, axis in ((x, ax.xaxis), (y, ax.yaxis)):
        axis.set_label_text(_LABELS.get(name, name.replace("_", " ")), fontsize=SMALL)
    ax.tick_params(labelsize=SMALL, length=2)
    ax.grid(color=FAINT, linewidth=0.4)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    _name_extremes(ax, statistics, across, up, most)
    headline(ax, "Heads, by what they attend to")
    footer(
        ax, list(ax.collections), [*_of_what(statistics), *computed_under(statistics)], below=0.35
    )
    return ax


def _of_what(statistics: xarray.Dataset) -> list[str]:
    """Over which rows the numbers are means."""
    tokens, repeated = (statistics.attrs.get(name) for name in ("tokens", "repeated"))
    if tokens is None:
        return []
    note = f"means over the rows of a text of {tokens} tokens"
    return [f"{note}; of induction, the {repeated} whose token came before" if repeated else note]


def _name_extremes(
    ax: Axes, statistics: xarray.Dataset, across: np.ndarray, up: np.ndarray, most: int
) -> None:
    """Names the heads with the largest values of either axis, where there is room for a name."""
    heads = across.shape[1]
    order = [np.argsort(-np.nan_to_num(v, nan=-np.inf).ravel())[:most] for v in (up, across)]
    taken: list[tuple[float, float]] = []
    ink = Ink.of(ax)
    width, height = inches(ax)
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    # Points in inches: a name may cover no other head.
    dots = np.stack(
        [(across - x0) / (x1 - x0) * width, (up - y0) / (y1 - y0) * height], -1
    ).reshape(-1, 2)
    for flat in dict.fromkeys(int(i) for pair in zip(*order, strict=True) for i in pair):
        layer, head = divmod(flat, heads)
        point = across[layer, head], up[layer, head]
        if not np.isfinite(point).all():
            continue
        at = dots[flat]
        others = np.delete(dots, flat, axis=0)
        for dx, dy, side in _PLACES:
            spot = at[0] + dx + (0.18 if side == "left" else -0.18), at[1] + dy
            covered = (abs(others - spot) < (0.2, 0.075)).all(axis=1).any()
            free = all(abs(spot[0] - a) > 0.4 or abs(spot[1] - b) > 0.11 for a, b in taken)
            if free and not covered and 0.18 < spot[0] < width + 0.05:
                break
        else:
            continue  # rather no name than one on top of another
        taken.append(spot)
        name = ax.annotate(
            f"L{int(statistics['layer'].values[layer])}.H{int(statistics['head'].values[head])}",
            point,
            xytext=(72 * dx, 72 * dy),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=SMALL - 0.5,
            color=INK,
        )
        if ink is not None:
            ink.inside(name)


_PLACES = (
    *((0.06, 0.0, "left"), (-0.06, 0.0, "right")),
    *((0.04, 0.1, "left"), (0.04, -0.1, "left"), (-0.04, 0.1, "right"), (-0.04, -0.1, "right")),
    *((-0.1, 0.15, "left"), (-0.1, -0.15, "left"), (0.1, 0.15, "right"), (0.1, -0.15, "right")),
)
