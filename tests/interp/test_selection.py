"""What is selected is what is computed: order, masks, heads, and positions that a text has not.

The reference is numpy's indexing of the whole site.
"""

import warnings

import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.errors import InterventionWarning

LENGTH = 12
IDS = np.random.default_rng(0).integers(6, 262, (2, LENGTH)).astype(np.int32)
VECTOR = np.ones(32, np.float32)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model[0]


@pytest.fixture(scope="module")
def trace(model):
    return gnb.trace(model, IDS[0], sites=())


@pytest.mark.parametrize(
    "positions", [[7, 3], [-1, 0], [7, 3, 7], np.arange(LENGTH) > 8, slice(2, 5), np.int64(4), None]
)
def test_patches_put_each_value_at_its_own_place(model, trace, positions):
    patch = gnb.Patch.from_trace(trace, "residual", -2, positions)
    seen = gnb.trace(model.intervene(patch), IDS[1], sites=()).get("residual", 1).values[0]
    at = np.arange(LENGTH)[slice(None) if positions is None else positions]
    np.testing.assert_array_equal(seen[at], trace.get("residual", 1).values[0][at])
    named = np.asarray(patch.positions)
    assert sorted(np.unique(at)) == named[named >= 0].tolist()  # the rest is padding


def test_patched_heads_keep_their_own_values(model, trace):
    z = trace.get("z", 1).values[0]
    patch = gnb.Patch.from_trace(trace, "z", 1, [4, 2], heads=[-1, 0])
    seen = gnb.trace(model.intervene(patch), IDS[1], sites=()).get("z", 1).values[0]
    np.testing.assert_array_equal(seen[[2, 4]], z[[2, 4]])
    key = gnb.Patch.from_trace(trace, "k", 1, [4, 2], heads=0)
    seen = gnb.trace(model.intervene(key), IDS[1], sites=()).get("k", 1).values[0]
    np.testing.assert_array_equal(seen[[2, 4]], trace.get("k", 1).values[0][[2, 4]])
    with pytest.raises(ValueError, match="head can be patched once"):
        gnb.Patch("z", 0, [1], np.zeros((1, 2, 16)), heads=[1, 1])
    with pytest.raises(ValueError, match="query's weights can be replaced once"):
        gnb.ReplaceAttention(0, 0, np.eye(2), queries=[3, 3])


def test_heads_are_those_of_the_site(trace):
    """Two query heads share one key-value head here."""
    for name in ("q", "z", "head_out"):
        found = trace.get(name, 0, heads=[True, False])
        np.testing.assert_array_equal(found, trace.get(name, 0).values[:, :, :1])
        assert found["head"].values.tolist() == [0]
    for name in ("k", "v"):
        assert trace.get(name, 0, heads=0).kv_head.values.tolist() == [0]
        with pytest.raises(ValueError, match="key-value head 1 does not exist"):
            trace.get(name, 0, heads=1)
    for name in ("residual", "mlp_hidden", "final"):
        with pytest.raises(ValueError, match=f"{name} has no heads: leave out heads="):
            trace.get(name, heads=0)
    with pytest.raises(ValueError, match="final exists once, not in each layer"):
        trace.get("final", 0)
    with pytest.raises(ValueError, match="2 query heads of z and the 1 key-value heads of k"):
        gnb.trace(trace.source.model, IDS[0], sites=("k", "z"), heads=0)
    both = gnb.trace(trace.source.model, IDS[0], sites=("residual", "z"), heads=1)
    assert (both.residual.sizes["position"], both.z.sizes["head"]) == (LENGTH, 1)


def test_a_held_part_of_the_key_value_heads_is_read_back(trace, tmp_path):
    part = trace.__copy__()
    part.data["k"] = trace.get("k", 1, heads=0)
    part.save(tmp_path / "part.nc")
    loaded = gnb.Trace.load(tmp_path / "part.nc")
    np.testing.assert_array_equal(loaded.get("k", 1, heads=0), part.data["k"])


def test_masks_choose_layers_and_positions(trace):
    layers, positions = np.array([True, False, True]), IDS[0] > np.median(IDS[0])
    whole = trace.get("residual").values
    found = trace.get("residual", layers, positions)
    np.testing.assert_array_equal(found, whole[layers][:, positions])
    lens = gnb.logit_lens(trace, 2, layers=layers, positions=positions)
    assert lens.layer.values.tolist() == [0, 2]
    assert lens.position.values.tolist() == np.flatnonzero(positions).tolist()
    with pytest.raises(ValueError, match="positions is a mask of 3, and there are 12 positions"):
        trace.get("residual", positions=layers)
    with pytest.raises(ValueError, match="heads is a mask of 3"):
        gnb.value_weighted_attention(trace, heads=layers)
    with pytest.raises(ValueError, match="token must be"):
        gnb.logit_lens(trace, watch=[3.7])


def test_masks_choose_in_interventions(model):
    assert model.intervene(gnb.AblateMLP([True, False, True])).interventions.describe() == (
        "ablate MLPs 0, 2 (zero) at all positions",
    )
    with pytest.raises(ValueError, match="layers is a mask of 2, and there are 3 layers"):
        model.intervene(gnb.AblateMLP([True, False]))
    with pytest.raises(ValueError, match="heads of layer 0 is a mask of 3"):
        model.intervene(gnb.AblateHeads({0: [True, False, True]}))
    with pytest.raises(ValueError, match="heads is a mask of 1, and there are 2 heads"):
        model.intervene(gnb.KnockOut(0, [True]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gnb.Steer([0, 1], VECTOR), "layer takes one layer, got 2"),
        (lambda: gnb.Steer(True, VECTOR), "layer must"),
        (lambda: gnb.Steer(1.0, VECTOR), "layer must"),
        (lambda: gnb.Patch("residual", [0, 1], [1], VECTOR), "layer takes one layer"),
        (lambda: gnb.KnockOut(slice(2)), "layer must be a whole number"),
        (lambda: gnb.ReplaceAttention(0, [0, 1], np.eye(3)), "head takes one head"),
        (lambda: gnb.EditNeuron(0, [1, 2], 3.0), "neuron takes one neuron"),
        (lambda: gnb.ForceToken(1, 2.5), "token must"),
        (lambda: gnb.ForceToken([1, 2], 3), "position takes one position"),
        (lambda: gnb.AblateHeads({0: [1.0]}), "heads of layer 0 must be whole numbers"),
        (lambda: gnb.ScaleHeads({0: {True: 2.0}}), "a head in factors must"),
        (lambda: gnb.Steer(0, VECTOR, positions=True), "positions must"),
        (lambda: gnb.Steer(0, VECTOR, positions=slice(1.5, None)), "positions must"),
        (lambda: gnb.Steer(0, VECTOR, positions=[]), "positions is empty"),
    ],
)
def test_what_names_no_single_thing_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_of_several_and_several_of_one_are_taken():
    lines = {str(gnb.Steer(layer, VECTOR)) for layer in (1, [1], np.array(1), np.int8(1), (1,))}
    assert len(lines) == 1
    lines = {str(gnb.AblateMLP(layers)) for layers in (1, [1], np.array([1]), slice(1, 2))}
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([gnb.Steer(0, VECTOR, positions=[3, 12])], "position 12 is not reached"),
        ([gnb.Steer(0, VECTOR, positions=slice(12, None))], "position 12 is not reached"),
        ([gnb.Patch("residual", 0, [12, 13], VECTOR)], "positions 12, 13 are not reached"),
        ([gnb.ForceToken(40, 7)], "position 40 is not reached"),
        ([gnb.KnockOut(0, queries=[3], keys=[30])], "position 30 is not reached"),
        ([gnb.ReplaceAttention(0, 0, np.eye(1), queries=[12])], "position 12 is not reached"),
        ([gnb.Steer(0, VECTOR, positions=np.arange(11) == 3)], "mask of positions is 11 long"),
        ([gnb.Steer(0, VECTOR, positions=np.arange(LENGTH) == 3)], ""),
        ([gnb.Steer(0, VECTOR, positions=slice(5, 99))], ""),
    ],
)
def test_what_a_text_does_not_reach_is_said(model, items, said):
    under = model.intervene(*items)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gnb.trace(under, IDS[0], sites=())
    words = [str(w.message) for w in caught if w.category is InterventionWarning]
    assert len(words) == bool(said)
    if said:
        assert said in words[0]
        assert "the text has 12 tokens, positions 0 to 11" in words[0]


def test_interventions_that_begin_behind_the_text_and_short_references_are_said(model):
    late = model.intervene(gnb.Steer(0, VECTOR), start=LENGTH)
    with pytest.warns(InterventionWarning, match="position 12 is not reached"):
        gnb.trace(late, IDS[0], sites=())
    with pytest.warns(InterventionWarning, match="position 12 is not reached"):
        late(gnb.GemmaInputs(IDS[0]))
    for early in (
        gnb.Steer(0, VECTOR, positions=[3]),
        gnb.AblateMLP(0, positions=slice(2, 7)),
        gnb.ForceToken(2, 9),
        gnb.KnockOut(0, queries=[6], keys=[0]),
    ):
        with pytest.warns(InterventionWarning, match="acts nowhere.* from position 7 on"):
            model.intervene(early, start=7)
    model.intervene(gnb.KnockOut(0, queries=[8], keys=[0]), gnb.Steer(0, VECTOR), start=7)
    reference = gnb.trace(model, IDS[0][:5], sites=())
    resampled = gnb.AblateMLP(0, "resample", reference=reference)
    with pytest.warns(InterventionWarning, match="nothing is replaced from position 5 on"):
        gnb.trace(model.intervene(resampled), IDS[0], sites=())
