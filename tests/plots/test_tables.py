"""What holds of tables, bars, curves, strips and points alike."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

import gemma_nb as gnb
from tests.plots import conftest as make
from tests.plots.drawing import (
    embedded_images,
    notes,
    overflows,
    save,
    written,
)

P = gnb.plots


@pytest.mark.parametrize(
    "plot",
    [
        lambda n: P.logit_lens(make.make_lens(n)),
        lambda n: P.logit_lens(make.make_lens(n), watch="日"),
        lambda n: P.entropy_curves(make.make_lens(n), value="kl"),
        lambda n: P.residual_norms(make.make_norms(n)),
        lambda n: P.token_probabilities(make.make_turn(n)),
        lambda n: P.token_probabilities(make.make_statistics(n), by="entropy"),
        lambda n: P.token_strip(make.make_token_attribution(n)),
        lambda n: P.attribution_bars(make.make_token_attribution(n)),
        lambda n: P.attribution_bars(make.make_attribution(n, "head")),
        lambda n: P.attribution_matrix(make.make_attribution(n)),
        lambda n: P.patching(make.make_sweep(n, "layer", "position")),
        lambda n: P.patching(make.make_sweep(n, "head", "position")),
    ],
)
def test_every_plot_of_every_length_is_saved_whole(plot, length):
    """Without warnings, boxes or clipped texts, and with images no larger than the screen."""
    figure = plot(length)
    assert isinstance(figure, Figure)
    files = save(figure)
    assert all(max(size) < 800 for size in embedded_images(files["svg"]))
    assert overflows(figure) == []


# --- what all have in common


@pytest.mark.parametrize(
    "plot",
    [
        lambda i: P.logit_lens(make.make_lens(5).assign_attrs(interventions=i)),
        lambda i: P.entropy_curves(make.make_lens(5).assign_attrs(interventions=i)),
        lambda i: P.residual_norms(make.make_norms(5).assign_attrs(interventions=i)),
        lambda i: P.token_probabilities(make.make_statistics(5).assign_attrs(interventions=i)),
        lambda i: P.token_strip(make.make_token_attribution(5).assign_attrs(interventions=i)),
        lambda i: P.attribution_bars(make.make_attribution(5).assign_attrs(interventions=i)),
        lambda i: P.attribution_matrix(make.make_attribution(5).assign_attrs(interventions=i)),
        lambda i: P.patching(make.make_sweep(5, "layer").assign_attrs(interventions=i)),
        lambda i: P.head_statistics(make.make_head_statistics().assign_attrs(interventions=i)),
    ],
)
def test_interventions_are_told(plot):
    told = "computed under Steer(layer=3)"
    assert told in notes(plot("Steer(layer=3)").axes[0])
    assert "computed under" not in notes(plot("").axes[0])


@pytest.mark.parametrize(
    ("plot", "data"),
    [
        (P.logit_lens, make.make_lens(60)),
        (P.entropy_curves, make.make_lens(60)),
        (P.residual_norms, make.make_norms(60)),
        (P.token_strip, make.make_token_attribution(60)),
        (P.attribution_bars, make.make_attribution(60)),
        (P.attribution_matrix, make.make_attribution(60)),
        (P.patching, make.make_sweep(60, "layer", "position")),
        (P.head_statistics, make.make_head_statistics()),
    ],
)
def test_plots_draw_where_they_are_told(plot, data):
    figure = Figure(layout="constrained", figsize=(7, 3))
    axes = figure.subplots(1, 2)[1]
    assert plot(data, ax=axes) is axes
    assert tuple(figure.get_size_inches()) == (7, 3)
    assert len(figure.axes) == 2
    save(figure)


@pytest.mark.parametrize(
    ("plot", "compute"),
    [
        (P.logit_lens, gnb.logit_lens),
        (P.entropy_curves, gnb.logit_lens),
        (P.residual_norms, gnb.residual_norms),
        (P.token_probabilities, gnb.token_statistics),
        (lambda given: P.head_statistics(given, y="bos_sink"), gnb.head_statistics),
    ],
)
def test_a_trace_is_drawn_as_what_is_computed_from_it(tiny_model, plot, compute):
    model, tokenizer = tiny_model
    trace = gnb.trace(model, "jagen Viktor", tokenizer=tokenizer)
    ours, theirs = plot(trace).axes[0], plot(compute(trace)).axes[0]
    assert written(ours) == written(theirs)
    for a, b in zip(ours.get_lines(), theirs.get_lines(), strict=True):
        np.testing.assert_array_equal(a.get_xydata(), b.get_xydata())
    for a, b in zip(ours.collections, theirs.collections, strict=True):
        if a.get_array() is not None:
            np.testing.assert_array_equal(a.get_array(), b.get_array())
        np.testing.assert_array_equal(a.get_offsets(), b.get_offsets())
