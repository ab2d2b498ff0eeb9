"""Tables, bars, curves, strips and points: what is drawn is the data, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import gemma_nb as gnb
from gemma_nb.plots.labels import drawable
from tests.plots import conftest as make
from tests.plots.drawing import drawn, embedded_images, notes, overflows, save, texts

P = gnb.plots


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


# --- the lens


def test_lens_shows_tokens_and_probabilities(length):
    lens = make.make_lens(length)
    figure = P.logit_lens(lens)
    axes = figure.axes[0]
    values = lens.probability.isel(rank=0).transpose("position", "layer").values
    words = lens.token.isel(rank=0).transpose("position", "layer").values
    if length <= 64:
        np.testing.assert_array_equal(drawn(axes), values.ravel())
        assert written(axes) == [drawable(w, 8) for w in words.ravel()]
        assert [t.get_text() for t in axes.get_yticklabels()] == [
            drawable(w) for w in lens.input_token.values
        ]
    else:
        np.testing.assert_array_equal(drawn(axes), largest_of_each(values, 4))
        assert written(axes) == []
        assert "the largest of each 4 tokens" in texts(figure)
    colored = next(a for a in [*axes.images, *axes.collections] if a.get_array() is not None)
    assert colored.get_clim() == (0, 1)
    assert [t.get_text() for t in axes.get_xticklabels()] == [str(i) for i in range(18)]
    assert axes.get_xticklabels()[4].get_color() != axes.get_xticklabels()[5].get_color()
    assert "local, window 512" in notes(axes)
    assert "global" in notes(axes)


def test_lens_frames_what_does_follow():
    lens = make.make_lens(60)
    axes = P.logit_lens(lens).axes[0]
    words = lens.token.isel(rank=0).transpose("position", "layer").values[:-1]
    hits = np.argwhere(words == lens.input_token.values[1:, None])
    frames = {(round(p.get_y() + 0.45), round(p.get_x() + 0.47)) for p in axes.patches}
    assert frames == set(map(tuple, hits.tolist()))
    assert "the token that follows in the text" in notes(axes)


@pytest.mark.parametrize("value", ["logprob", "logit", "entropy", "kl"])
def test_lens_in_other_numbers(value):
    lens = make.make_lens(5)
    axes = P.logit_lens(lens, value=value, rank=1, start=1, stop=4).axes[0]
    numbers = lens[value].isel(position=slice(1, 4))
    numbers = numbers.isel(rank=1) if "rank" in numbers.dims else numbers
    np.testing.assert_array_equal(
        drawn(axes), numbers.transpose("position", "layer").values.ravel()
    )
    assert "prediction 2" in axes.get_title("left")
    low, high = axes.collections[0].get_clim()
    assert (low == 0) == (value in ("entropy", "kl"))
    assert (high == 0) == (value == "logprob")


def test_lens_watches_a_token():
    lens = make.make_lens(5)
    by_text, by_id = (P.logit_lens(lens, watch=w).axes[0] for w in ("日", 9))
    ranks = lens.watched_rank.isel(watched=1).transpose("position", "layer").values + 1
    assert written(by_text) == written(by_id) == [str(r) for r in ranks.ravel()]
    logprobs = lens.watched_logprob.isel(watched=1).transpose("position", "layer").values
    np.testing.assert_array_equal(drawn(by_text), logprobs.ravel())


def test_lens_refuses_what_is_not_there():
    lens = make.make_lens(5)
    for kwargs, message in (
        ({"value": "colour"}, "'probability', 'logprob'"),
        ({"rank": 3}, "the lens has ranks 0 to 2"),
        ({"start": 5}, "no position"),
        ({"watch": " dog"}, "watch="),
    ):
        with pytest.raises(ValueError, match=message):
            P.logit_lens(lens, **kwargs)


# --- curves


def test_curves_of_few_positions_are_one_by_one():
    lens = make.make_lens(60)
    axes = P.entropy_curves(lens, positions=[0, 7, 30]).axes[0]
    curves = [line for line in axes.lines if line.get_gid() is None]
    for line, position in zip(curves, (0, 7, 30), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), lens.entropy.sel(position=position))
    assert "after 30" in notes(axes)
    ticks = next(line for line in axes.lines if line.get_gid() == "global layers")
    assert list(ticks.get_xdata()) == [5, 11, 17]
    with pytest.raises(ValueError, match="positions \\[60\\]"):
        P.entropy_curves(lens, positions=[60])
    with pytest.raises(ValueError, match="'entropy', 'kl'"):
        P.entropy_curves(lens, value="norm")


def test_curves_of_many_positions_are_medians_and_bands():
    lens = make.make_lens(60)
    axes = P.entropy_curves(lens, value="kl").axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), lens.kl.median("position"))
    assert "medians of 60 positions; bands: the middle 80%" in notes(axes)
    edges = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert edges.max() == pytest.approx(float(lens.kl.quantile(0.9, "position").max()))


def test_norms_tell_the_first_position_apart(length):
    norms = make.make_norms(length)
    axes = P.residual_norms(norms).axes[0]
    rest = norms.isel(position=slice(1, None))
    for i, name in enumerate(("residual", "attn_out", "mlp_out")):
        median, first = axes.lines[2 * i : 2 * i + 2]
        np.testing.assert_allclose(median.get_ydata(), rest[name].median("position"), rtol=1e-6)
        np.testing.assert_array_equal(first.get_ydata(), norms[name].isel(position=0))
    assert axes.get_yscale() == "log"
    assert "the same at position 0" in notes(axes)
    hidden = P.residual_norms(norms, hide_bos=True).axes[0]
    assert "position 0 is left out" in notes(hidden)
    assert len(hidden.lines) == len(axes.lines) - 3


# --- strips


@pytest.mark.parametrize("by", ["probability", "surprisal", "entropy", "rank"])
def test_strips_color_every_token_by_its_number(length, by):
    turn = make.make_turn(length)
    axes = P.token_probabilities(turn, by=by).axes[0]
    numbers = {
        "probability": [np.exp(t.logprob) for t in turn.tokens],
        "surprisal": [-t.logprob for t in turn.tokens],
        "entropy": [t.entropy for t in turn.tokens],
        "rank": [t.rank + 1 for t in turn.tokens],
    }[by]
    if length > 500:
        np.testing.assert_allclose(drawn(axes).compressed(), numbers, rtol=1e-12)
        assert "100 tokens on a line" in notes(axes)
        return
    mesh = bar_of(axes)
    low, high = mesh.norm.vmin, mesh.norm.vmax
    assert (low, high) == (by == "rank", 1.0 if by == "probability" else max(numbers))
    boxes = axes.collections[0].get_facecolors()
    np.testing.assert_allclose(boxes, mesh.cmap(mesh.norm(np.array(numbers))))
    shown = [t.strip("\u2068\u2069") for t in written(axes)]
    assert shown == [drawable(t.piece, 40) for t in turn.tokens]


def test_strips_of_texts_leave_the_first_token_open():
    statistics = make.make_statistics(60)
    axes = P.token_probabilities(statistics, by="rank", stop=20).axes[0]
    assert len(written(axes)) == 20
    assert axes.collections[0].get_facecolors()[0][3] == 0
    assert "without colour: the first token, which nothing predicts" in notes(axes)
    with pytest.raises(ValueError, match="by must be one of"):
        P.token_probabilities(statistics, by="colour")
    with pytest.raises(ValueError, match="no token lies"):
        P.token_probabilities(statistics, start=60)


def test_strips_of_signed_numbers_have_zero_in_the_middle():
    values = make.make_token_attribution(60)
    axes = P.token_strip(values).axes[0]
    mesh = bar_of(axes)
    assert mesh.norm.vmin == -mesh.norm.vmax == -float(np.abs(values).max())
    positive = P.token_strip(abs(values), top=2.0).axes[0]
    mesh = bar_of(positive)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 2)
    with pytest.raises(ValueError, match="one number per token"):
        P.token_strip(make.make_attribution(5))


def test_strips_wrap_inside_their_axes():
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    assert P.token_probabilities(make.make_turn(60), ax=axes) is figure
    left, right = axes.get_xlim()
    for text in axes.texts:
        assert left <= text.get_position()[0] <= right
    save(figure)


def test_user_turns_have_no_strip():
    from gemma_nb.chat.events import Turn

    with pytest.raises(ValueError, match="reply of the model"):
        P.token_probabilities(Turn(id=1, role="user", text="Hello"))


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
    assert "logit of ·Paris\nafter position 7" in axes.get_title("left").replace("\u2068", "")
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
        assert "·Rome←·cat" in [t.get_text() for t in axes.get_yticklabels()]
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
    assert axes.get_title("left") == "Patched: residual"
    with pytest.raises(ValueError, match="select one place"):
        P.patching(make.make_sweep(5, "layer", "position", "head"))


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


def test_statistics_that_are_not_known():
    statistics = make.make_head_statistics()
    with pytest.raises(ValueError, match="there are 'previous_token', 'bos_sink'"):
        P.head_statistics(statistics, x="colour")
    statistics["induction"][:] = np.nan
    with pytest.raises(ValueError, match="head_scores"):
        P.head_statistics(statistics)
    P.head_statistics(statistics, y="bos_sink")


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
    assert told in notes(plot(["Steer(layer=3)"]).axes[0])
    assert "computed under" not in notes(plot([]).axes[0])


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
    assert plot(data, ax=axes) is figure
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
