"""Heatmaps: what is drawn is the data, and nothing else."""

import io
import warnings

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

import gemma_nb as gnb
from gemma_nb.plots.labels import drawable, tick_step


@pytest.fixture(scope="module")
def trace(tiny_model):
    model, tokenizer = tiny_model
    return gnb.trace(model, "Zwölf Boxkämpfer\njagen Viktor", tokenizer=tokenizer)


def mesh_of(figure):
    return next(c for c in figure.axes[0].collections if isinstance(c, QuadMesh))


def render(figure):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png")
        figure.savefig(io.BytesIO(), format="svg")


def test_cells_are_the_weights_and_the_rest_is_masked(trace):
    figure = gnb.plots.attention(trace, 0, 1)
    assert isinstance(figure, Figure)
    drawn = mesh_of(figure).get_array().reshape(len(trace.tokens), -1)
    weights = trace.attention.sel(layer=0, head=1).values
    query, key = np.indices(weights.shape)
    reachable = (key <= query) & (key > query - 8)
    np.testing.assert_array_equal(~np.ma.getmaskarray(drawn), reachable)
    np.testing.assert_array_equal(drawn.compressed(), weights[reachable])
    render(figure)


def test_what_cannot_be_attended_is_hatched(trace):
    """Both staircases have the area of the cells that they stand for."""
    count = len(trace.tokens)
    hatched = [p for p in gnb.plots.attention(trace, 0, 0).axes[0].patches if p.get_hatch()]
    assert all(isinstance(patch, Polygon) for patch in hatched)
    areas = []
    for patch in hatched:
        x, y = patch.get_xy().T
        areas.append(abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2)
    later = count * (count - 1) / 2
    outside = (count - 8) * (count - 7) / 2
    assert sorted(areas) == pytest.approx(sorted([later, outside]))


def test_ranges_rows_and_scales(trace):
    figure = gnb.plots.attention(trace, 2, 0, start=5, stop=15, scale="sqrt", highlight=9)
    axes = figure.axes[0]
    assert axes.get_xlim() == (4.5, 14.5)
    assert axes.get_ylim() == (14.5, 4.5)
    assert len(axes.get_yticklabels()) == 10
    assert "square-root" in figure.axes[1].get_ylabel()
    frame = next(patch for patch in axes.patches if not patch.get_hatch())
    assert (frame.get_y(), frame.get_height()) == (8.5, 1)


def test_hiding_the_sink_says_so(trace):
    figure = gnb.plots.attention(trace, 2, 0, hide_bos=True)
    assert "without the column of position 0" in figure.axes[0].get_title("left")
    drawn = mesh_of(figure).get_array().reshape(len(trace.tokens), -1)
    assert np.ma.getmaskarray(drawn)[:, 0].all()


def test_titles_name_the_layer_kind(trace):
    assert "Layer 2 (global), head 0" in gnb.plots.attention(trace, 2, 0).axes[0].get_title("left")
    assert "(sliding 8)" in gnb.plots.attention(trace, 1, 0).axes[0].get_title("left")


def test_draws_where_it_is_told(trace):
    figure = Figure()
    ax = figure.add_subplot(1, 2, 1)
    assert gnb.plots.attention(trace, 0, 0, ax=ax) is figure
    render(figure)


@pytest.mark.parametrize(
    ("args", "message"),
    [((3, 0), "holds layers"), ((0, 2), "heads 0 to 1"), ((0, -1), "heads 0 to 1")],
)
def test_what_is_not_there_is_refused(trace, args, message):
    with pytest.raises(ValueError, match=message):
        gnb.plots.attention(trace, *args)


def test_empty_ranges_are_refused(trace):
    with pytest.raises(ValueError, match="no position"):
        gnb.plots.attention(trace, 0, 0, start=10, stop=10)


def test_notebooks_show_the_figure(trace):
    assert gnb.plots.attention(trace, 0, 0)._repr_png_().startswith(b"\x89PNG")


def test_labels_can_be_drawn():
    assert drawable(" the\n") == "·the⏎"
    assert drawable("$x$") == r"\$x\$"
    assert drawable("\ue000") == "U+E000"
    assert drawable("a" * 40) == "a" * 13 + "…"


@pytest.mark.parametrize("text", ["日本語", "مرحبا", "😀👩‍👩‍👧", "\x00\ufeff", "$\\frac$", ""])
def test_any_script_renders_without_warnings(trace, text):
    import dataclasses

    labelled = dataclasses.replace(trace, labels=(text, *trace.labels[1:]))
    figure = gnb.plots.attention(labelled, 0, 0)
    render(figure)
    assert figure.axes[0].get_yticklabels()[0].get_text() == drawable(text)


def test_long_texts_label_some_of_their_tokens():
    assert tick_step(60) == 1
    assert tick_step(2000) == 32
