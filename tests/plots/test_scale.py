"""Axes and colours by matplotlib's names: ax, norm, vmin, vmax, cmap."""

from __future__ import annotations

import inspect

import matplotlib
import numpy as np
import pytest
import xarray
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure

import gemma_nb as gnb
from tests.plots import conftest as make
from tests.plots.drawing import bar_of, notes, pixels, save, texts

P = gnb.plots
SIGNED = make.make_token_attribution(8)
SWEEP = make.make_sweep(5, "layer", "position")

# Every public plot, with data of its own; those of the second table have a colour scale.
PLAIN = {
    "attention_lines": lambda **kw: P.attention_lines(make.make_attention(6), 0, 1, **kw),
    "attribution_bars": lambda **kw: P.attribution_bars(SIGNED, **kw),
    "entropy_curves": lambda **kw: P.entropy_curves(make.make_lens(5), **kw),
    "head_statistics": lambda **kw: P.head_statistics(make.make_head_statistics(), **kw),
    "residual_norms": lambda **kw: P.residual_norms(make.make_norms(5), **kw),
}
COLORED = {
    "attention": lambda **kw: P.attention(make.make_attention(6), 0, 1, **kw),
    "attention_grid": lambda **kw: P.attention_grid(make.make_attention(6), **kw),
    "attribution_matrix": lambda **kw: P.attribution_matrix(make.make_attribution(5), **kw),
    "logit_lens": lambda **kw: P.logit_lens(make.make_lens(5), **kw),
    "patching": lambda **kw: P.patching(SWEEP, **kw),
    "token_probabilities": lambda **kw: P.token_probabilities(make.make_turn(8), **kw),
    "token_strip": lambda **kw: P.token_strip(SIGNED, **kw),
}
ALL = {**PLAIN, **COLORED}


def test_every_public_plot_is_here():
    assert sorted(ALL) == P.__all__
    for name in P.__all__:
        parameters = inspect.signature(getattr(P, name)).parameters
        assert "ax" in parameters
        colors = {"vmin", "vmax", "norm", "cmap"} & set(parameters)
        assert colors == ({"vmin", "vmax", "norm", "cmap"} if name in COLORED else set())
        assert inspect.signature(getattr(P, name)).return_annotation == "Figure | Axes"


@pytest.mark.parametrize("plot", ALL)
def test_given_axes_come_back_and_their_figure_stays(plot):
    """Of a 2x2, one is drawn in: size, settings, layout and the other three are as before."""
    figure = Figure(figsize=(9, 7), dpi=70)
    grid = figure.subplots(2, 2)
    for ax in grid.flat:
        ax.plot([0, 3], [0, 5], color="red")
        ax.set_title("mine")
    others = [ax for ax in grid.flat if ax is not grid[0, 1]]
    grid[0, 1].clear()
    before = pixels(figure)
    state = [(ax.get_position().bounds, ax.get_xlim(), len(ax.get_children())) for ax in others]
    settings = dict(matplotlib.rcParams)
    place = grid[0, 1].get_position(original=True).bounds
    assert ALL[plot](ax=grid[0, 1]) is grid[0, 1]
    assert tuple(figure.get_size_inches()) == (9, 7)
    assert figure.axes == list(grid.flat)
    assert dict(matplotlib.rcParams) == settings
    assert grid[0, 1].get_position(original=True).bounds == place
    assert state == [
        (ax.get_position().bounds, ax.get_xlim(), len(ax.get_children())) for ax in others
    ]
    after = pixels(figure)
    assert not np.array_equal(before, after)
    corner = after[: len(after) // 2, : after.shape[1] // 4]  # the middle of the axes beside it
    assert np.array_equal(corner, before[: len(after) // 2, : after.shape[1] // 4])
    save(figure)


@pytest.mark.parametrize("plot", ALL)
def test_without_axes_a_figure_comes_back(plot):
    figure = ALL[plot]()
    assert isinstance(figure, Figure)
    # It is a figure of the user's from now on: what is drawn into it later leaves its size alone.
    size = tuple(figure.get_size_inches())
    more = figure.add_axes((0.5, 0.5, 0.3, 0.3))
    assert isinstance(ALL[plot](ax=more), Axes)
    assert tuple(figure.get_size_inches()) == size


@pytest.mark.parametrize("plot", ALL)
def test_wrong_axes_say_what_is_expected(plot):
    for wrong in (Figure().subplots(2, 2), Figure(), "axes"):
        with pytest.raises(TypeError, match=r"ax must be one matplotlib Axes, got an? \w+: of"):
            ALL[plot](ax=wrong)


@pytest.mark.parametrize("plot", COLORED)
def test_a_norm_is_taken_as_it_is(plot):
    norm = PowerNorm(0.7, -3.0, 2.0)
    ax = COLORED[plot](norm=norm, cmap="viridis").axes[0]
    mesh = bar_of(ax)
    assert mesh.norm is norm
    assert (norm.vmin, norm.vmax) == (-3.0, 2.0)
    assert mesh.cmap.name == "viridis"
    for limit in ("vmin", "vmax"):
        with pytest.raises(ValueError, match="either a norm or vmin= and vmax="):
            COLORED[plot](norm=norm, **{limit: 0.5})
    for wrong in ([0, 1], 3):
        with pytest.raises(TypeError, match="norm"):
            COLORED[plot](norm=wrong)
    with pytest.raises(ValueError, match="'linear'"):
        COLORED[plot](norm="no such scale")


@pytest.mark.parametrize("plot", COLORED)
def test_limits_are_those_that_were_asked_for(plot):
    ax = COLORED[plot](vmin=-0.25, vmax=0.5).axes[0]
    assert (bar_of(ax).norm.vmin, bar_of(ax).norm.vmax) == (-0.25, 0.5)
    for wrong in ("high", [1, 2], float("nan"), None.__class__):
        with pytest.raises(TypeError, match="vmax must be a finite number"):
            COLORED[plot](vmax=wrong)
    with pytest.raises(ValueError, match="vmin must be below vmax, got 5 and -5"):
        COLORED[plot](vmin=5, vmax=-5)


@pytest.mark.parametrize("plot", COLORED)
def test_open_limits_of_a_norm_become_those_of_the_values(plot):
    """In the norm itself, so that several pictures share it."""
    norm = Normalize()
    COLORED[plot](norm=norm)
    assert norm.scaled()
    low, high = norm.vmin, norm.vmax
    COLORED[plot](norm=norm)
    assert (norm.vmin, norm.vmax) == (low, high)


def test_scales_are_named_as_in_matplotlib():
    maps = make.make_attention(6)
    ax = P.attention(maps, 0, 1, norm="log").axes[0]
    assert isinstance(bar_of(ax).norm, LogNorm)
    shown = maps.sel(layer=0, head=1).values
    assert bar_of(ax).norm.vmax == pytest.approx(float(shown.max()))
    ax = P.attention(maps, 0, 1, norm="log", vmin=1e-3, vmax=1.0).axes[0]
    assert (bar_of(ax).norm.vmin, bar_of(ax).norm.vmax) == (1e-3, 1.0)
    for plot in (
        lambda **kw: P.attention(maps, 0, 1, **kw),
        lambda **kw: P.attention_grid(maps, **kw),
    ):
        with pytest.raises(ValueError, match="PowerNorm"):
            plot(scale="sqrt", norm="log")
        with pytest.raises(ValueError, match="'linear' or 'sqrt'"):
            plot(scale="cube")
    strip = P.token_probabilities(make.make_turn(8), by="rank", norm=Normalize(1, 50))
    assert "logarithmic" not in texts(strip)
    assert "logarithmic" in texts(P.token_probabilities(make.make_turn(8), by="rank"))


@pytest.mark.parametrize(
    ("limits", "extend"),
    [
        ({}, "neither"),
        ({"vmax": 1e-3}, "max"),
        ({"vmin": 1e-3}, "min"),
        ({"vmin": 0.2, "vmax": 0.21}, "both"),
        ({"norm": Normalize(0.0, 1e-3)}, "max"),
    ],
)
def test_the_bar_is_pointed_where_numbers_go_on(limits, extend):
    for plot in ("attention", "attention_grid"):
        ax = COLORED[plot](**limits).axes[0]
        mesh = next(a for a in [*ax.images, *ax.collections] if a.get_array() is not None)
        assert mesh.colorbar.extend == extend


def test_white_stays_zero_under_uneven_limits():
    """And equal colours stay equal distances: the map is cut, not stretched."""
    for plot, zero in (("token_strip", 0.0), ("attribution_matrix", 0.0), ("patching", -1.2)):
        whole = bar_of(COLORED[plot](vmin=zero - 4, vmax=zero + 4).axes[0])
        for given, limits in (
            ({"vmax": zero + 4}, (zero - 4, zero + 4)),
            ({"vmin": zero - 4}, (zero - 4, zero + 4)),
            ({"vmin": zero - 1, "vmax": zero + 4}, (zero - 1, zero + 4)),
            ({"vmin": zero - 4, "vmax": zero + 1}, (zero - 4, zero + 1)),
            ({"vmin": zero + 1, "vmax": zero + 4}, (zero + 1, zero + 4)),
        ):
            mesh = bar_of(COLORED[plot](**given).axes[0])
            assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx(limits)
            for value in np.linspace(*limits, 9):
                ours, theirs = (np.array(m.cmap(m.norm(value))) for m in (mesh, whole))
                np.testing.assert_allclose(ours, theirs, atol=0.03)
    ax = P.patching(SWEEP, norm=Normalize(-2, 2)).axes[0]
    assert "(white)" not in notes(ax)
    assert "1.9  clean" in texts(ax.figure)
    assert "1.9  clean" not in texts(P.patching(SWEEP, vmax=0.5))


@pytest.mark.parametrize(
    ("plot", "expected"),
    [
        (
            lambda wrong: P.attention(wrong, 0, 0),
            r"a Trace or an array \(layer, head, query, key\)",
        ),
        (P.attention_grid, r"a Trace or an array \(layer, head, query, key\)"),
        (lambda wrong: P.attention_lines(wrong, 0, 0), r"a Trace or an array"),
        (P.logit_lens, r"a Trace or the Dataset of gnb\.logit_lens"),
        (P.entropy_curves, r"a Trace or the Dataset of gnb\.logit_lens"),
        (P.residual_norms, r"a Trace or the Dataset of gnb\.residual_norms"),
        (P.head_statistics, r"a Trace or the Dataset of gnb\.head_statistics"),
        (P.token_probabilities, r"a Turn, a Trace or the Dataset of gnb\.token_statistics"),
        (P.token_strip, r"values must be an xarray\.DataArray"),
        (P.attribution_bars, r"attribution must be an xarray\.DataArray"),
        (P.attribution_matrix, r"attribution must be an xarray\.DataArray"),
        (P.patching, r"sweep must be an xarray\.DataArray"),
    ],
)
def test_wrong_sources_say_what_is_expected(plot, expected):
    for wrong in ("text", np.zeros((3, 3)), None):
        with pytest.raises(TypeError, match=f"{expected}.*got an? "):
            plot(wrong)


def test_datasets_of_something_else_say_so():
    for plot in (P.logit_lens, P.entropy_curves, P.residual_norms, P.token_probabilities):
        with pytest.raises(ValueError, match=r"expected the Dataset of gnb\..* this one has 'x'"):
            plot(xarray.Dataset({"x": 3}))
