"""Token axes: every token by name while there is room, positions and turns beyond."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation

from gemma_nb.plots.colors import INK, role_color
from gemma_nb.plots.figure import SMALL, inches
from gemma_nb.plots.labels import drawable, families, isolated
from gemma_nb.plots.labels import inches as label_width

if TYPE_CHECKING:
    import xarray

LABEL = SMALL - 0.5  # points
# Inches from one label to the next, below which they would touch.
PITCH = 0.115
# Beyond this many, an axis gives an overview.
MOST_LABELS = 64


class Span(NamedTuple):
    """A run of positions of one turn: the first, and the one after the last."""

    name: str
    role: str
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens along one axis.

    Attributes:
      labels: what each token stands for.
      positions: (T,) absolute positions.
      roles: who speaks at each position, "" where nobody does; None if that is not known.
      turns: (T,) number of the turn, negative outside of turns; None if that is not known.
      others: what stands there in another text; shown where it differs.
    """

    labels: tuple[str, ...]
    positions: np.ndarray
    roles: tuple[str, ...] | None = None
    turns: np.ndarray | None = None
    others: tuple[str, ...] | None = None

    @classmethod
    def along(cls, array: xarray.DataArray | xarray.Dataset, dim: str) -> Tokens:
        """Reads the coordinates of `dim`: "position", "query" or "key".

        Where "token" is something else, a prediction, the text's own is "input_token".
        """
        prefix = "" if dim == "position" else f"{dim}_"
        positions = array[dim].values
        names = [f"{prefix}{name}" for name in ("token", "role", "turn")]
        if "input_token" in array.coords:
            names[0] = "input_token"
        token, role, turn = (array[n].values if n in array.coords else None for n in names)
        return cls(
            labels=tuple(map(str, positions if token is None else token)),
            positions=np.asarray(positions),
            roles=None if role is None else tuple(map(str, role)),
            turns=None if turn is None else np.asarray(turn),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def drawn(self, index: int) -> str:
        """Label of a token; "a ← b" where it is b in the other text."""
        label = self.labels[index]
        if self.others is None or self.others[index] == label:
            return drawable(label)
        pair = (isolated(drawable(each, 10)) for each in (label, self.others[index]))
        return " ← ".join(pair)

    def spans(self) -> list[Span]:
        """The turns along the axis, in indices of the axis; empty if they are not known."""
        return list(self._spans())

    def _spans(self) -> Iterator[Span]:
        if self.roles is None or not any(self.roles):
            return
        turns = self.turns if self.turns is not None else np.zeros(len(self), int)
        edges = [i for i in range(1, len(self)) if self._differs(i, turns)]
        for first, last in zip([0, *edges], [*edges, len(self)], strict=True):
            role, number = self.roles[first], int(turns[first])
            named = f"{role} {number}" if self.turns is not None and number >= 0 else role
            yield Span(named if role else "other", role, first, last)

    def _differs(self, i: int, turns: np.ndarray) -> bool:
        assert self.roles is not None
        return self.roles[i] != self.roles[i - 1] or bool(turns[i] != turns[i - 1])


def nice_step(count: int, most: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that cuts `count` into at most `most` parts."""
    step = 1
    for factor in (2, 2.5, 2) * 12:
        if count <= step * most:
            break
        step = int(step * factor)
    return step


def label_axis(
    ax: Axes,
    which: Literal["x", "y"],
    tokens: Tokens,
    *,
    always: Iterable[int] = (),
) -> None:
    """Names the tokens along an axis whose cell i is centred at tokens.positions[i].

    As many as find room, up to 64, are named by their texts; more by position and turn.

    Args:
      ax: where.
      which: axis.
      tokens: along that axis.
      always: positions that are named in an overview as well.
    """
    at, labels = ticks(tokens, inches(ax)[which == "y"], always)
    font: dict[str, Any] = {"fontfamily": families(labels), "fontsize": LABEL, "color": INK}
    if which == "x":
        ax.set_xticks(at, labels, rotation=90, **font)
    else:
        ax.set_yticks(at, labels, **font)
    spans = tokens.spans()
    ax.tick_params(axis=which, length=0, pad=7.0 if spans else 2.0)
    top = ax.xaxis.get_ticks_position() == "top"
    draw_strip(ax, tokens, "left" if which == "y" else "top" if top else "bottom")


def ticks(
    tokens: Tokens, extent: float, always: Iterable[int] = ()
) -> tuple[np.ndarray, list[str]]:
    """Positions and labels for an axis of `extent` inches; see `label_axis`."""
    if len(tokens) <= MOST_LABELS and extent / max(len(tokens), 1) >= 0.8 * PITCH:
        return tokens.positions, [tokens.drawn(i) for i in range(len(tokens))]
    return _overview(tokens, extent, sorted(set(always)))


def label_inches(tokens: Tokens) -> float:
    """Room that the labels of an axis take beside it, of a figure made to fit them."""
    if len(tokens) > MOST_LABELS:
        return 0.5
    return label_width([tokens.drawn(i) for i in range(len(tokens))], LABEL) + 0.15


def _overview(tokens: Tokens, extent: float, always: list[int]) -> tuple[np.ndarray, list[str]]:
    """Round positions, and `always` with their tokens in place of those that they would touch."""
    first, last = int(tokens.positions[0]), int(tokens.positions[-1])
    step = nice_step(last - first + 1, max(2, min(12, int(extent / (2.5 * PITCH)))))
    ticks = {p: str(p) for p in range(-(-first // step) * step, last + 1, step)}
    near = (last - first + 1) * PITCH / extent
    for p in (p for p in always if first <= p <= last):
        ticks = {q: text for q, text in ticks.items() if abs(q - p) > near}
        ticks[p] = f"{p} {isolated(tokens.drawn(p - first))}"
    return np.array(list(ticks)), list(ticks.values())


def draw_strip(ax: Axes, tokens: Tokens, side: Literal["left", "right", "top", "bottom"]) -> None:
    """A coloured line along one side of the axes, outside of them, that tells the turns."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    vertical = side in ("left", "right")
    far = float(side in ("right", "top"))
    points = 3.5 if far else -3.5
    shift = (points, 0.0) if vertical else (0.0, points)
    base = ax.get_yaxis_transform() if vertical else ax.get_xaxis_transform()
    place = base + ScaledTranslation(shift[0] / 72, shift[1] / 72, figure.dpi_scale_trans)
    for span in tokens.spans():
        # A hair's breadth between turns of one role.
        ends = [tokens.positions[span.first] - 0.46, tokens.positions[span.last - 1] + 0.46]
        ax.plot(
            *(([far, far], ends) if vertical else (ends, [far, far])),
            color=role_color(span.role),
            linewidth=3.5,
            solid_capstyle="butt",
            transform=place,
            clip_on=False,
            scalex=False,
            scaley=False,
            gid=f"turn {span.name}",
        )


def role_handles(tokens: Tokens) -> list[Artist]:
    """Legend entries of the roles along an axis."""
    roles = dict.fromkeys(span.role for span in tokens.spans())
    return [Patch(facecolor=role_color(role), label=role or "between turns") for role in roles]
