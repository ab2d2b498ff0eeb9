"""Bars, matrices and points: what is drawn is the data, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.patches import Rectangle

import gemma_nb as gnb
from tests.plots import conftest as make
from tests.plots.drawing import (
    drawn,
    largest_of_each,
    notes,
    overflows,
    save,
    texts,
    written,
)

P = gnb.plots


# --- attributions


@pytest.mark.parametrize("by", ["component", "head"])
def test_bars_add_up(by):
    attribution = make.make_attribution(60, by)
    axes = P.attribution_bars(attribution, position=7, most=20).axes[0]
    column = attribution.sel(position=7)
    bars = [p.get_width() for p in axes.patches if isinstance(p, Rectangle)]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert len(bars) == 21
    assert names[-1] == f"{column.size - 20} others together"
    assert sum(bars) == pytest.approx(float(column.sum()), rel=1e-5)
    for name, bar in zip(names[:-1], bars[:-1], strict=True):
        assert bar == pytest.approx(float(column.sel(component=name)))
    least = min(map(abs, bars[:-1]))
    assert (np.abs(column.values) >= least * 0.9999).sum() == 20
    title = axes.get_title("left").replace("\u2068", "")
    assert "Direct logit attribution: ·Paris\nafter position 7" in title
    assert f"all bars add up to {float(column.sum()):.4g}" in notes(axes)


def test_bars_of_tokens_name_them(length):
    values = make.make_token_attribution(length)
    axes = P.attribution_bars(values).axes[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert len(names) == min(length, 41)
    assert names[0].split()[0].isdigit()
    with pytest.raises(ValueError, match="select or sum"):
        P.attribution_bars(make.make_attribution(5).expand_dims("head"))
    with pytest.raises(ValueError, match="position 99 is not among 0 to 4"):
        P.attribution_bars(make.make_attribution(5), position=99)


def test_attributions_say_what_of_and_how():
    values = make.make_token_attribution(5).assign_attrs(query=4)
    told = "of log p(·cat) after position 4, by gradient × input"
    assert told in notes(P.attribution_bars(values).axes[0])
    assert told in notes(P.token_strip(values).axes[0])
    # Split over the positions that heads read: one prediction, many sources.
    sources = make.make_attribution(5, "head").assign_coords(query=4)
    title = P.attribution_bars(sources, position=2).axes[0].get_title("left")
    assert "after position 4: what is read at position 2 (·cat)" in title
    axes = P.attribution_matrix(sources).axes[0]
    assert axes.get_title("left").endswith("\nafter position 4")
    assert axes.get_ylabel() == "position that is read"
    plain = P.attribution_matrix(make.make_attribution(5)).axes[0]
    assert plain.get_ylabel() == "position: the prediction after it"
    against = make.make_attribution(5).assign_attrs(against=" Rome")
    figure = P.attribution_matrix(against)
    assert figure.axes[0].get_title("left") == "Direct logit attribution: ·Paris minus ·Rome"
    assert overflows(figure) == overflows(P.attribution_matrix(sources)) == []


def test_bars_are_labelled_with_two_digits():
    values = make.make_token_attribution(4)
    values[:] = [0.1, -12.0, 3e-5, 1.26]
    assert written(P.attribution_bars(values).axes[0]) == ["+0.10", "-12", "+3.0e-05", "+1.3"]


def test_matrices_are_the_data_with_zero_white(length):
    attribution = make.make_attribution(length)
    axes = P.attribution_matrix(attribution).axes[0]
    values = attribution.transpose("position", "component").values
    if length <= 64:
        np.testing.assert_array_equal(drawn(axes), values.ravel())
    else:
        np.testing.assert_array_equal(drawn(axes), largest_of_each(values, 4, 0.0))
    colored = next(a for a in [*axes.images, *axes.collections] if a.get_array() is not None)
    low, high = colored.get_clim()
    assert low == -high == -float(np.abs(values).max())
    assert np.ptp(colored.cmap(0.5)[:3]) < 0.02
    assert [t.get_text() for t in axes.get_xticklabels()] == attribution.component.values.tolist()
    with pytest.raises(ValueError, match="attribution_bars"):
        P.attribution_matrix(make.make_token_attribution(5))
    with pytest.raises(ValueError, match="no position"):
        P.attribution_matrix(attribution, start=length)


# --- patching


@pytest.mark.parametrize("over", [("layer", "position"), ("position", "head"), ("position",)])
def test_patching_by_position(length, over):
    sweep = make.make_sweep(length, *over)
    figure = P.patching(sweep)
    axes = figure.axes[0]
    values = sweep.transpose("position", ...).values.reshape(length, -1)
    if length <= 64:
        np.testing.assert_array_equal(drawn(axes), values.ravel())
        assert "·Rome ← ·cat" in [t.get_text() for t in axes.get_yticklabels()]
        assert "a ← b: a in the clean text, b in the corrupted one" in notes(axes)
    else:
        np.testing.assert_array_equal(drawn(axes), largest_of_each(values, 4, -1.2))
        assert "the strongest of each 4 tokens" in texts(figure)


@pytest.mark.parametrize("over", [("layer", "head"), ("head", "layer"), ("layer",), ("head",)])
def test_patching_by_layer_and_head(over):
    sweep = make.make_sweep(5, *over)
    figure = P.patching(sweep)
    expected = sweep.transpose(*[d for d in ("layer", "head") if d in over]).values
    np.testing.assert_array_equal(drawn(figure.axes[0]), expected.ravel())
    save(figure)


def test_patching_is_the_metric_and_white_is_the_corrupted_run():
    figure = P.patching(make.make_sweep(5, "layer", "position"))
    axes = figure.axes[0]
    (mesh,) = (c for c in axes.collections if c.get_array() is not None)
    low, high = mesh.get_clim()
    assert (low + high) / 2 == pytest.approx(-1.2)
    assert "-1.2  corrupted" in texts(figure)
    assert "1.9  clean" in texts(figure)
    assert "unpatched: 1.9 in the clean run, -1.2 in the corrupted one" in notes(axes)
    assert axes.get_title("left") == "Activation patching of residual"
    with pytest.raises(ValueError, match="select one place"):
        P.patching(make.make_sweep(5, "layer", "position", "head"))


def test_patching_says_what_else_was_patched():
    sweep = make.make_sweep(5, "layer", "position", "head").assign_attrs(site="z")
    titles = {
        "layer 3": sweep.sel(layer=3),
        "position 2 (·cat)": sweep.sel(position=2),
        "layer 3, head 1": sweep.sel(layer=3, head=1),
        "all positions at once": make.make_sweep(5, "layer", "head").assign_attrs(
            over="layer, head"
        ),
        "all layers at once": make.make_sweep(5, "position", "head").assign_attrs(
            over="position, head"
        ),
    }
    for told, chosen in titles.items():
        figure = P.patching(chosen.assign_attrs(site="z"))
        assert figure.axes[0].get_title("left") == f"Activation patching of z\n{told}"
        assert overflows(figure) == []
    # What was summed over is not known to have been patched at once.
    summed = sweep.max("head", keep_attrs=True).assign_attrs(over="layer, position, head")
    assert P.patching(summed).axes[0].get_title("left") == "Activation patching of z"


def test_patching_marks_kv_groups():
    sweep = make.make_sweep(5, "layer", "head").assign_coords(kv_group=("head", [0, 0, 1, 1]))
    axes = P.patching(sweep).axes[0]
    assert {"KV group 0", "KV group 1"} <= set(written(axes))
    assert [t.get_text() for t in axes.get_xticklabels()] == [f"head {h}" for h in range(4)]


def test_metrics_are_drawn_in_any_script():
    sweep = make.make_sweep(5, "layer", "position")
    metric = "logit of '$の\ue000' minus logit of 'مرحبا'"
    figure = P.patching(sweep.assign_attrs(metric=metric))
    assert "U+E000" in texts(figure)
    save(figure)


# --- heads


def test_heads_are_points_by_kind():
    statistics = make.make_head_statistics()
    figure = P.head_statistics(statistics, x="previous_token", y="induction", most=4)
    axes = figure.axes[0]
    local, wide = axes.collections
    assert len(local.get_offsets()) == 15 * 4
    expected = statistics.sel(layer=[5, 11, 17])
    points = np.column_stack([expected[n].values.ravel() for n in ("previous_token", "induction")])
    np.testing.assert_allclose(wide.get_offsets(), points)
    assert "L7.H2" in written(axes)
    assert "L4.H1" in written(axes)
    assert "head of a local layer" in notes(axes)
    assert overflows(figure) == []
    save(figure)


def test_names_of_heads_cover_no_other_head():
    statistics = make.make_head_statistics()
    statistics["induction"][:] = 0.0
    statistics["induction"][7, 2] = 0.9
    figure = P.head_statistics(statistics.assign_attrs(tokens=101, repeated=50))
    axes = figure.axes[0]
    assert "means over the rows of a text of 101 tokens; of induction, the 50" in notes(axes)
    figure.draw_without_rendering()
    dots = np.concatenate([axes.transData.transform(c.get_offsets()) for c in axes.collections])
    assert "L4.H1" in written(axes)
    for text in axes.texts:
        box = text.get_window_extent()
        inside = (dots > (box.x0, box.y0)).all(1) & (dots < (box.x1, box.y1)).all(1)
        assert not inside.any(), text.get_text()


def test_statistics_that_are_not_known():
    statistics = make.make_head_statistics()
    with pytest.raises(ValueError, match="there are 'previous_token', 'bos_sink'"):
        P.head_statistics(statistics, x="colour")
    statistics["induction"][:] = np.nan
    with pytest.raises(ValueError, match="head_scores"):
        P.head_statistics(statistics)
    P.head_statistics(statistics, y="bos_sink")
