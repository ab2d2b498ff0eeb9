"""Attention plots: what is drawn is the data, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

import gemma_nb as gnb
from gemma_nb.plots.colors import HIDDEN
from gemma_nb.plots.labels import drawable
from tests.plots.conftest import make_attention
from tests.plots.drawing import area, drawn, embedded_images, notes, overflows, save, texts

REACH = {0: 8, 1: 512, 2: 10**9}


def visible(length: int, layer: int) -> np.ndarray:
    query, key = np.ogrid[:length, :length]
    return (key <= query) & (key > query - REACH[layer])


@pytest.fixture(scope="module")
def sixty():
    return make_attention(60)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_cells_are_the_weights_and_the_rest_is_empty(maps, layer):
    figure = gnb.plots.attention(maps, layer, 1)
    assert isinstance(figure, Figure)
    length, weights = maps.sizes["key"], maps.sel(layer=layer, head=1).values
    mask = visible(length, layer)
    shown = drawn(figure.axes[0])
    if length <= 64:
        np.testing.assert_array_equal(shown, weights[mask])
    else:  # the largest of each 4 x 4 cells, and nothing where none is visible
        blocks = np.where(mask, weights, -1).reshape(500, 4, 500, 4).max((1, 3))
        np.testing.assert_array_equal(np.ma.getmaskarray(shown), blocks == -1)
        np.testing.assert_array_equal(shown.compressed(), blocks[blocks >= 0])
        assert "the largest of each 4 × 4 cells" in texts(figure)
    assert overflows(figure) == []


def test_files_are_vectors_with_small_images(maps):
    files = save(gnb.plots.attention(maps, 0, 1, hide_bos=True, highlight=3))
    sizes = embedded_images(files["svg"])
    assert all(max(size) < 800 for size in sizes)
    if maps.sizes["key"] <= 64:
        assert len(files["svg"]) < 500_000
    assert b"/Type3" not in files["pdf"].replace(b" ", b"")


def test_labels_up_to_sixty_tokens_and_positions_beyond(maps):
    axes = gnb.plots.attention(maps, 2, 0, highlight=3).axes[0]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    length = maps.sizes["key"]
    if length <= 64:
        assert labels == [drawable(w) for w in maps.query_token.values]
        assert [t.get_text() for t in axes.get_xticklabels()] == labels
    else:
        assert "400" in labels
        assert "3 ⏎" in labels  # the framed row keeps its token
        assert len(labels) < 16


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_what_cannot_be_attended_is_hatched(maps, layer):
    """Both staircases have the area of the cells that they stand for; the edge has its line."""
    axes = gnb.plots.attention(maps, layer, 0).axes[0]
    count = maps.sizes["key"]
    hatched = [p for p in axes.patches if p.get_hatch()]
    assert all(isinstance(patch, Polygon) for patch in hatched)
    beyond = max(count - REACH[layer], 0)
    expected = [count * (count - 1) / 2, *[beyond * (beyond + 1) / 2] * (beyond > 0)]
    assert sorted(map(area, hatched)) == pytest.approx(sorted(expected))
    edge = [line for line in axes.lines if "edge of the window" in str(line.get_label())]
    assert len(edge) == (beyond > 0)
    for line in edge:
        x, y = line.get_data()
        assert (x[0], y[0]) == (-0.5, REACH[layer] - 0.5)
        assert (x[-1], y[-1]) == (count - REACH[layer] - 0.5, count - 0.5)
    assert ("edge of the window" in notes(axes)) == (beyond > 0)
    assert "can never be attended to" in notes(axes)


@pytest.mark.parametrize(
    ("layer", "badge"), [(0, "local, window 8"), (1, "local, window 512"), (2, "global")]
)
def test_titles_badges_and_kv_groups(sixty, layer, badge):
    axes = gnb.plots.attention(sixty, layer, 2).axes[0]
    assert axes.get_title("left") == f"Layer {layer}, head 2"
    assert axes.get_title("right") == badge
    assert "KV group 1: heads 2 and 3 share keys and values" in notes(axes)
    assert ("every position shown lies inside the window" in notes(axes)) == (layer == 1)


def test_hiding_the_sink_says_so_and_leaves_the_rest(sixty):
    axes = gnb.plots.attention(sixty, 2, 0, hide_bos=True).axes[0]
    weights = sixty.sel(layer=2, head=0).values
    share = weights[:, 0].mean()
    assert f"position 0 left out: rows that reach it give it {share:.0%}" in notes(axes)
    mask = visible(60, 2)
    mask[:, 0] = False
    np.testing.assert_array_equal(drawn(axes), weights[mask])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_columns_collapse_to_turns(maps, layer):
    figure = gnb.plots.attention(maps, layer, 3, columns="turns")
    axes = figure.axes[0]
    length = maps.sizes["key"]
    names = [t.get_text() for t in axes.get_xticklabels()]
    assert names == ["system 0", "user 1", "model 2", "user 3", "model 4"]
    turns, weights = maps.key_turn.values, maps.sel(layer=layer, head=3).values
    sums = np.stack([weights[:, turns == i].sum(1) for i in range(5)], 1)
    seen = np.stack([visible(length, layer)[:, turns == i].any(1) for i in range(5)], 1)
    if length <= 64:
        np.testing.assert_allclose(drawn(axes), sums[seen], rtol=1e-6)
    else:
        largest = np.where(seen, sums, -1).reshape(-1, 4, 5).max(1)
        np.testing.assert_allclose(drawn(axes).filled(-1), largest, rtol=1e-5)
    hatched = sum(p.get_width() * p.get_height() for p in axes.patches if p.get_hatch())
    assert hatched == (~seen).sum()
    assert "summed over each turn" in texts(figure)
    assert overflows(figure) == []
    save(figure)


def test_turns_are_whole_whichever_rows_are_shown(sixty):
    """The rows of a global layer still add up to one."""
    axes = gnb.plots.attention(sixty, 2, 0, columns="turns", start=50).axes[0]
    assert len(axes.get_yticklabels()) == 10
    np.testing.assert_allclose(drawn(axes).reshape(10, 5).sum(1), 1, rtol=1e-5)
    hidden = gnb.plots.attention(sixty, 0, 0, columns="turns", start=50, hide_bos=True).axes[0]
    assert "position 0 left out: rows that reach it give it 0%" in notes(hidden)


def test_turns_must_be_known():
    with pytest.raises(ValueError, match=r"chat\.trace"):
        gnb.plots.attention(make_attention(5, chat=False), 0, 0, columns="turns")
    with pytest.raises(ValueError, match="'tokens' or 'turns'"):
        gnb.plots.attention(make_attention(5), 0, 0, columns="words")


def test_turns_are_told_by_strips_of_their_colour(sixty):
    axes = gnb.plots.attention(sixty, 0, 0).axes[0]
    strips = [line for line in axes.lines if str(line.get_gid()).startswith("turn ")]
    assert [s.get_gid() for s in strips[:5]] == [
        *("turn system 0", "turn user 1", "turn model 2", "turn user 3", "turn model 4")
    ]
    assert strips[1].get_color() == strips[3].get_color() != strips[2].get_color()
    for role in ("system", "user", "model"):
        assert role in notes(axes)
    plain = gnb.plots.attention(make_attention(60, chat=False), 0, 0).axes[0]
    assert not [line for line in plain.lines if line.get_gid()]


def test_ranges_rows_and_scales(sixty):
    figure = gnb.plots.attention(sixty, 2, 0, start=5, stop=15, scale="sqrt", highlight=9, vmax=0.5)
    axes = figure.axes[0]
    assert axes.get_xlim() == (4.5, 14.5)
    assert axes.get_ylim() == (14.5, 4.5)
    assert len(axes.get_yticklabels()) == 10
    assert "square-root" in texts(figure)
    assert axes.collections[0].get_clim() == (0, 0.5)
    assert axes.collections[0].norm(0.125) == pytest.approx(0.5)
    frame = next(p for p in axes.patches if isinstance(p, Rectangle))
    assert (frame.get_x(), frame.get_y(), frame.get_width()) == (4.5, 8.5, 10)
    assert "the row of position 9" in notes(axes)


def test_draws_where_it_is_told(sixty):
    figure = Figure(layout="constrained", figsize=(7, 3))
    left, right = figure.subplots(1, 2)
    size = tuple(figure.get_size_inches())
    assert gnb.plots.attention(sixty, 0, 0, ax=left) is left
    assert gnb.plots.attention_lines(sixty, 0, 0, ax=right) is right
    assert tuple(figure.get_size_inches()) == size
    # No room for sixty labels: positions instead.
    assert [t.get_text() for t in left.get_yticklabels()][:2] == ["0", "10"]
    save(figure)


def test_arrays_without_heads_have_no_window(sixty):
    rollout = sixty.mean("head").rename("attention_rollout")
    figure = gnb.plots.attention(rollout, 0)
    axes = figure.axes[0]
    assert len(drawn(axes)) == 60 * 61 // 2
    assert axes.get_title("left") == "Layer 0"
    assert axes.get_title("right") == ""
    assert "attention rollout" in texts(figure)
    with pytest.raises(ValueError, match="leave out head=1"):
        gnb.plots.attention(rollout, 0, 1)


def test_interventions_are_told(sixty):
    changed = sixty.copy()
    changed.attrs["interventions"] = "AblateHeads({5: [1]})"
    for plot in (gnb.plots.attention, gnb.plots.attention_lines):
        assert "computed under AblateHeads({5: [1]})" in notes(plot(changed, 0, 0).axes[0])
    axes = gnb.plots.attention_grid(changed).axes[0]
    assert "computed under AblateHeads({5: [1]})" in notes(axes)


@pytest.mark.parametrize("plot", [gnb.plots.attention, gnb.plots.attention_lines])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((3, 0), r"layer 3 is not here; the layers are \[0, 1, 2\]"),
        ((0, 4), "head 4 is not here; the heads are"),
        ((0, -1), "head -1 is not here"),
        ((0,), "head None is not here"),
    ],
)
def test_what_is_not_there_is_refused(sixty, plot, args, message):
    with pytest.raises(ValueError, match=message):
        plot(sixty, *args)
    with pytest.raises(ValueError, match="no position"):
        plot(sixty, 0, 0, start=10, stop=10)


def test_positions_with_gaps_are_not_drawn_as_neighbours(sixty):
    with pytest.raises(ValueError, match=r"neighbouring positions.*\[2, 3, 20\]"):
        gnb.plots.attention(sixty.sel(query=[2, 3, 20]), 0, 0)
    whole = gnb.plots.attention(sixty.sel(query=[2, 3, 20]), 0, 0, start=2, stop=4)
    np.testing.assert_array_equal(
        drawn(whole.axes[0]),
        sixty.sel(layer=0, head=0, query=[2, 3], key=[2, 3]).values[[0, 1, 1], [0, 0, 1]],
    )


def test_masks_choose_what_a_grid_shows(sixty):
    chosen = gnb.plots.attention_grid(sixty, layers=[True, False, True], heads=slice(1, 3))
    same = gnb.plots.attention_grid(sixty, layers=[0, 2], heads=[1, 2])
    np.testing.assert_array_equal(*(f.axes[0].images[0].get_array() for f in (chosen, same)))
    with pytest.raises(ValueError, match="layers is a mask of 2, and there are 3 layers"):
        gnb.plots.attention_grid(sixty, layers=[True, False])
    with pytest.raises(ValueError, match="layer must be whole numbers or a mask"):
        gnb.plots.attention(sixty, True, 0)


def test_notebooks_show_the_figure(sixty):
    assert gnb.plots.attention(sixty, 0, 0)._repr_png_().startswith(b"\x89PNG")


def test_traces_are_drawn(tiny_model):
    model, tokenizer = tiny_model
    trace = gnb.trace(model, "Zwölf Boxkämpfer\njagen Viktor", tokenizer=tokenizer)
    axes = gnb.plots.attention(trace, 1, 1).axes[0]
    weights = trace.attention.sel(layer=1, head=1).values
    np.testing.assert_array_equal(drawn(axes), weights[visible(len(weights), 0)])
    assert axes.get_title("right") == "local, window 8"
    assert "KV group 0: heads 0 and 1" in notes(axes)
    save(gnb.plots.attention_grid(trace))
    save(gnb.plots.attention_lines(trace, 2, 0))
    with pytest.raises(ValueError, match="layers are 0 to 2"):
        gnb.plots.attention(trace, 3, 0)


# --- the grid


def test_grid_shows_every_head_on_one_scale(maps):
    figure = gnb.plots.attention_grid(maps, layers=[2, 0], heads=[3, 1, 0])
    axes = figure.axes[0]
    (image,) = axes.images
    tall, wide = image.get_array().shape
    length = maps.sizes["key"]
    for i, layer in enumerate((2, 0)):
        for j, head in enumerate((3, 1, 0)):
            cell = image.get_array()[i * tall // 2 : (i + 1) * tall // 2]
            cell = cell[:, j * wide // 3 : (j + 1) * wide // 3].compressed()
            weights = maps.sel(layer=layer, head=head).values
            shown = weights[visible(length, layer)]
            assert cell.max() == shown.max()
            assert np.isin(cell, shown).all()
            if length <= 64:  # every weight, equally often
                values, counts = np.unique(cell, return_counts=True)
                np.testing.assert_array_equal(values, np.unique(shown))
                assert len(set(counts / np.unique(shown, return_counts=True)[1])) == 1
    assert image.get_clim() == (0, float(maps.sel(layer=[2, 0], head=[3, 1, 0]).max()))
    assert ("the largest of each" in texts(figure)) == (length > 64)
    assert overflows(figure) == []
    save(figure)


def test_grid_names_layers_heads_and_groups(sixty):
    figure = gnb.plots.attention_grid(sixty, hide_bos=True, scale="sqrt")
    axes = figure.axes[0]
    layers = [t.get_text() for t in axes.get_yticklabels()]
    assert layers == ["0  local, window 8", "1  local, window 512", "2  global"]
    assert axes.get_yticklabels()[0].get_color() != axes.get_yticklabels()[2].get_color()
    assert [t.get_text() for t in axes.get_xticklabels()] == [f"head {i}" for i in range(4)]
    assert "KV group 0" in texts(figure)
    assert "KV group 1" in texts(figure)
    assert "position 0 is left out" in notes(axes)
    # Grey in its place, one column in every cell: down to the window's edge, or all the way.
    grey = [p for p in axes.patches if to_hex(p.get_facecolor()) == HIDDEN.lower()]
    heights = [np.ptp(box[:, 1]) for box in grey[0].get_path().to_polygons()]
    assert len(grey) == 1
    np.testing.assert_allclose(heights, 0.9 * np.repeat([8 / 60, 1, 1], 4))
    assert "square-root" in texts(figure)
    bos = sixty.sel(layer=2, head=0).values[1:, 0]
    assert not np.isin(axes.images[0].get_array().compressed(), bos).any()
    with pytest.raises(ValueError, match="layer 9 is not here"):
        gnb.plots.attention_grid(sixty, layers=[9])
    with pytest.raises(ValueError, match="head 9 is not here"):
        gnb.plots.attention_grid(sixty, heads=[9])


def test_grid_hatches_what_cannot_be_attended():
    maps = make_attention(20)
    axes = gnb.plots.attention_grid(maps, layers=[0], heads=[0]).axes[0]
    (hatch,) = [p for p in axes.patches if p.get_hatch()]
    areas = []
    for corners in hatch.get_path().to_polygons():
        x, y = corners.T / 0.9 * 20
        areas.append(abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2)
    assert areas == pytest.approx([20 * 19 / 2, 12 * 13 / 2])


# --- lines


@pytest.mark.parametrize("length", [5, 60])
def test_lines_are_the_weights(length):
    maps = make_attention(length)
    figure = gnb.plots.attention_lines(maps, 1, 2, least=0.03)
    axes = figure.axes[0]
    weights = maps.sel(layer=1, head=2).values
    (lines,) = axes.collections
    segments = np.array(lines.get_segments())
    row, key = segments[:, 0, 1].astype(int), segments[:, 1, 1].astype(int)
    assert len(segments) == (weights >= 0.03).sum()
    np.testing.assert_allclose(lines.get_linewidths(), 4 * weights[row, key], rtol=1e-6)
    below = np.where(weights < 0.03, weights, 0).sum(1).mean()
    assert f"weights below 0.03 are not drawn: {below:.0%} of a row on average" in notes(axes)
    assert overflows(figure) == []
    save(figure)


def test_lines_of_a_long_text_are_bundled_and_say_so():
    maps = make_attention(200)
    axes = gnb.plots.attention_lines(maps, 0, 0, least=0.02).axes[0]
    weights = maps.sel(layer=0, head=0).values
    expected = np.array([[weights[i : i + 4, j : j + 4].sum(1).mean() for j in range(0, 200, 4)]
                         for i in range(0, 200, 4)])  # fmt: skip
    (lines,) = axes.collections
    segments = np.array(lines.get_segments())
    row, key = ((segments[:, end, 1] - 1.5) / 4 for end in (0, 1))
    assert len(segments) == (expected >= 0.02).sum()
    widths = 1.6 * expected[row.astype(int), key.astype(int)]
    np.testing.assert_allclose(lines.get_linewidths(), widths, rtol=1e-5)
    assert "each line joins blocks of 4 positions" in notes(axes)
    below = np.where(expected < 0.02, expected, 0).sum(1).mean()
    assert f"weights below 0.02 are not drawn: {below:.0%} of a row on average" in notes(axes)
    save(axes.figure)
    # A few queries are drawn as they are.
    few = gnb.plots.attention_lines(maps, 0, 0, queries=[150, 151], least=0).axes[0]
    assert set(np.array(few.collections[0].get_segments())[:, 0, 1]) == {150, 151}


def test_lines_of_one_query_bracket_what_it_can_reach(sixty):
    axes = gnb.plots.attention_lines(sixty, 0, 2, queries=30, least=0, hide_bos=True).axes[0]
    segments = np.array(axes.collections[0].get_segments())
    assert sorted(segments[:, 1, 1]) == list(range(23, 31))
    assert set(segments[:, 0, 1]) == {30}
    (box,) = axes.patches
    assert (box.get_y(), box.get_height()) == (22.5, 8)
    assert "what position 30 can reach: 8 positions" in notes(axes)
    assert "position 0 left out: these rows give it 0%" in notes(axes)
    with pytest.raises(ValueError, match="not among the positions 0 to 59"):
        gnb.plots.attention_lines(sixty, 0, 2, queries=[60])
