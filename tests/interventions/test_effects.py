"""Interventions: exact where they act, nothing elsewhere."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb import model as model_module
from gemma_nb.interventions import Intervention
from tests.interventions.checks import assert_close, logits


class NoPytree(Intervention):
    sites = ("residual",)


@flax.struct.dataclass
class Elsewhere(Intervention):
    sites = ("somewhere",)


def test_ablating_a_head_equals_zeroing_its_rows_of_the_projection(case):
    model, ids = case
    zeroed = model.edit("layer_2/attn/attn_vec_einsum/w", lambda w: jnp.asarray(w).at[1].set(0.0))
    ablated = model.intervene(gnb.AblateHeads({2: [1]}))
    assert_close(logits(ablated, ids), logits(zeroed, ids), atol=1e-5)
    assert np.abs(logits(ablated, ids) - logits(model, ids)).max() > 1e-2
    half = model.edit(
        "layer_2/attn/attn_vec_einsum/w", lambda w: jnp.asarray(w).at[1].multiply(0.5)
    )
    assert_close(logits(model.intervene(gnb.ScaleHeads({2: {1: 0.5}})), ids), logits(half, ids))


@pytest.mark.filterwarnings("ignore::gemma_nb.errors.InterventionWarning")
def test_no_intervention_is_none_bit_for_bit_and_the_original_is_untouched(case):
    model, ids = case
    before = logits(model, ids)
    vector = np.ones(64, np.float32)
    for neutral in (
        gnb.ScaleHeads({2: {1: 1.0}}),
        gnb.Steer(2, vector, scale=0.0),
        gnb.AblateHeads({2: [1]}, positions=[1000]),
        gnb.KnockOut(2, queries=[1000]),
    ):
        assert_close(logits(model.intervene(neutral), ids), before, atol=1e-5)
    changed = model.intervene(gnb.Steer(2, vector, scale=5.0))
    assert np.abs(logits(changed, ids) - before).max() > 1e-2
    np.testing.assert_array_equal(logits(model, ids), before)
    np.testing.assert_array_equal(logits(changed.intervene(), ids), before)
    assert model.interventions is None
    same = jax.tree.map(lambda a, b: a is b, model.params, changed.params)
    assert all(jax.tree.leaves(same))


def test_without_interventions_the_program_is_the_same(case):
    model, ids = case
    tokens = jnp.asarray(ids)[None]

    def program(**call):
        run = jax.jit(lambda p: model.transformer.apply({"params": p}, tokens, **call).logits)
        return run.lower(model.params).as_text()

    assert program() == program(interventions=None)


def test_other_values_do_not_compile_again(case):
    model, ids = case
    vector = np.ones(64, np.float32)
    logits(model.intervene(gnb.Steer(2, vector), gnb.AblateHeads({1: [0]})), ids)
    compiled = model_module._score._cache_size()
    logits(model.intervene(gnb.Steer(4, 2 * vector, 3.0), gnb.AblateHeads({3: [2]})), ids)
    assert model_module._score._cache_size() == compiled


def test_patching_everything_reproduces_the_other_run(case):
    model, ids = case
    other = np.random.default_rng(1).integers(1, 320, len(ids))
    trace = gnb.trace(model, other, sites=())
    for site, layer in (("embed", None), ("residual", 5), ("residual_pre", 0), ("final", None)):
        patch = gnb.Patch.from_trace(trace, site, layer)
        assert_close(logits(model.intervene(patch), ids), logits(model, other))
    every = [gnb.Patch.from_trace(trace, site, i) for i in range(6) for site in ("z", "mlp_hidden")]
    both = model.intervene(gnb.Patch.from_trace(trace, "embed"), *every)
    assert_close(logits(both, ids), logits(model, other))


def test_a_patched_position_leaves_those_before_it(case):
    model, ids = case
    other = gnb.trace(model, ids[::-1].copy(), sites=())
    patched = logits(model.intervene(gnb.Patch.from_trace(other, "z", 1, 7, heads=[2])), ids)
    before = logits(model, ids)
    assert_close(patched[:7], before[:7], atol=1e-5)
    assert np.abs(patched[7:] - before[7:]).max(axis=-1).min() > 1e-4
    trace = gnb.trace(model.intervene(gnb.Patch.from_trace(other, "z", 1, 7, heads=[2])), ids)
    assert_close(trace.z[1, 7, 2], other.z[1, 7, 2], atol=0)
    assert trace.interventions == ("patch z of layer 1, heads 2 at positions 7",)
    assert trace.z.attrs["interventions"].splitlines() == list(trace.interventions)


def test_means_and_resampled_values(case):
    model, ids = case
    reference = gnb.trace(model, ids[::-1].copy(), sites=())
    mean = model.intervene(gnb.AblateHeads({2: [1]}, "mean", reference=reference))
    z = gnb.trace(mean, ids, sites="z").z.values[2, :, 1]
    assert_close(z, np.broadcast_to(reference.z.values[2, :, 1].mean(0), z.shape), atol=1e-6)
    resampled = model.intervene(gnb.AblateMLP([3], "resample", reference=reference))
    got = gnb.trace(resampled, ids, sites="mlp_out").mlp_out.values[3]
    assert_close(got, reference.mlp_out.values[3], atol=0)
    zero = gnb.trace(model.intervene(gnb.AblateMLP(3)), ids, sites="mlp_out").mlp_out.values[3]
    assert (zero == 0).all()
    with pytest.raises(ValueError, match="needs reference"):
        gnb.AblateHeads({2: [1]}, "mean")


def test_knocked_out_edges_carry_nothing(case):
    model, ids = case
    cut = model.intervene(gnb.KnockOut(2, [1], queries=slice(5, 12), keys=[0, 3]))
    weights = gnb.trace(cut, ids).attention.values
    assert (weights[2, 1, 5:12, [0, 3]] == 0).all()
    np.testing.assert_allclose(weights[2, 1].sum(-1), 1, atol=1e-5)
    whole = gnb.trace(model, ids).attention.values
    assert_close(weights[2, [0, 2, 3]], whole[2, [0, 2, 3]], atol=1e-5)
    assert_close(weights[2, 1, :5], whole[2, 1, :5], atol=1e-6)
    alone = gnb.trace(model.intervene(gnb.KnockOut(2, keys=slice(None))), ids, sites="z")
    assert (alone.z.values[2] == 0).all()


def test_attention_is_replaced(case):
    model, ids = case
    rows = np.eye(24, dtype=np.float32)[:2]
    new = gnb.trace(model.intervene(gnb.ReplaceAttention(2, 1, rows, queries=[9, 20])), ids)
    np.testing.assert_array_equal(new.attention.values[2, 1, [9, 20]], rows)
    assert_close(new.z.values[2, 9, 1], new.v.values[2, 0, 0], atol=1e-6)


def test_a_forced_token_is_read_in_place_of_the_one_that_stands_there(case):
    model, ids = case
    other = ids.copy()
    other[6] = 11
    np.testing.assert_array_equal(
        logits(model.intervene(gnb.ForceToken(6, 11)), ids), logits(model, other)
    )


def test_neurons_are_edited(case):
    model, ids = case

    def hidden(value):
        under = model.intervene(gnb.EditNeuron(4, 17, value, positions=[3]))
        return gnb.trace(under, ids, sites=()).mlp_hidden.values[4]

    plain = gnb.trace(model, ids, sites=()).mlp_hidden.values[4]
    same, edited = hidden(plain[3, 17]), hidden(2.5)
    assert_close(same, plain)
    assert edited[3, 17] == 2.5
    edited[3, 17] = plain[3, 17]
    np.testing.assert_array_equal(edited, same)  # of one program, so to the last bit


def test_interventions_start_where_they_are_told(case):
    model, ids = case
    late = model.intervene(gnb.AblateHeads({2: [1]}), start=10)
    assert_close(logits(late, ids)[:10], logits(model, ids)[:10], atol=1e-5)
    assert np.abs(logits(late, ids)[10:] - logits(model, ids)[10:]).max() > 1e-3
    assert late.interventions.describe()[0].endswith("from position 10 on")
    with pytest.raises(ValueError, match="start=10"):
        late.intervene(gnb.AblateHeads({2: [1]}))
    with pytest.raises(ValueError, match="from 0 on, got -1"):
        model.intervene(gnb.AblateHeads({2: [1]}), start=-1)


def test_what_the_model_has_once_is_steered(case):
    model, ids = case
    steered = model.intervene(gnb.Steer(None, np.ones(64), 0.5, site="final", positions=[3]))
    final, plain = (gnb.trace(m, ids, sites="final").final.values for m in (steered, model))
    expected = plain + 0.5 * (np.arange(24) == 3)[:, None]
    assert_close(final, expected, atol=1e-5)
    (line,) = steered.interventions.describe()
    assert line == "steer final by 0.5 times a vector of norm 8 at positions 3"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gnb.AblateHeads({9: [0]}), "layers 0 to 5"),
        (lambda: gnb.ScaleHeads({0: {4: 1.0}}), "heads 0 to 3"),
        (lambda: gnb.Steer(0, np.zeros(3)), r"\(64,\), got \(3,\)"),
        (lambda: gnb.Patch("residual", 0, [1], np.zeros((1, 7))), r"\(64,\)"),
        (lambda: gnb.Patch("attention", 0, [1], np.zeros(7)), "cannot be changed there"),
        (lambda: gnb.Patch("residual", None, [1], np.zeros(7)), "name one"),
        (lambda: gnb.EditNeuron(0, 96, 1.0), "neurons 0 to 95"),
        (lambda: gnb.KnockOut(0, queries=[-1]), "from 0 on"),
        (lambda: gnb.ForceToken(0, 320), "0 to 319"),
        # Nothing that would act nowhere.
        (lambda: gnb.AblateHeads({-1: [0]}), "layers from 0, got -1"),
        (lambda: gnb.AblateHeads({0: [-1]}), "heads from 0, got -1"),
        (lambda: gnb.AblateMLP(-2), "layers from 0, got -2"),
        (lambda: gnb.Patch("residual", -1, [1], np.zeros(64)), "layers from 0"),
        (lambda: gnb.Patch("residual", 0, [-1], np.zeros(64)), "from 0 on"),
        (lambda: gnb.Patch("residual", 0, [1, 1], np.zeros((2, 64))), "patched once, got 1, 1"),
        (lambda: gnb.Patch("z", 0, [1], np.zeros((1, 1, 16)), heads=[-1]), "heads from 0"),
        (lambda: gnb.Patch("residual", 0, [1], np.zeros((1, 1, 64)), heads=[0]), "has no heads"),
        (lambda: gnb.Steer(-1, np.zeros(64)), "layers from 0"),
        (lambda: gnb.EditNeuron(-1, 0, 1.0), "layers from 0"),
        (lambda: gnb.KnockOut(-1), "layers from 0"),
        (lambda: gnb.KnockOut(0, heads=[-1]), "heads from 0"),
        (lambda: gnb.ReplaceAttention(-1, 0, np.eye(3)), "layers from 0"),
        (lambda: gnb.ReplaceAttention(0, -1, np.eye(3)), "heads from 0"),
        (lambda: gnb.ReplaceAttention(0, 0, np.eye(1), queries=[-3]), "from 0 on"),
        (lambda: gnb.ForceToken(-1, 5), "from 0 on"),
        # Nor what is no intervention.
        (lambda: gnb.AblateHeads([5]), r"by their layer, such as \{5: \[2, 3\]\}"),
        (lambda: gnb.AblateHeads({5: 1}), "by their layer"),
        (lambda: gnb.ScaleHeads({5: [1]}), "factor by its layer"),
        (lambda: {5: [1]}, "expected interventions"),
        (lambda: NoPytree(), r"no pytree: decorate the class with @flax\.struct\.dataclass"),
        (lambda: Elsewhere(), "names the sites somewhere"),
    ],
)
def test_what_the_model_does_not_have_is_refused(case, make, message):
    with pytest.raises(ValueError, match=message):
        case[0].intervene(make())


@flax.struct.dataclass
class AddEverywhere(Intervention):
    """Of a class of one's own, as a user writes it."""

    value: jax.Array
    strength: float = 2.0

    sites = ("residual",)


@flax.struct.dataclass
class Told(AddEverywhere):
    def __str__(self):
        return "adds\n" + "numbers " * 100


def test_each_is_told_in_one_line_without_arrays(case):
    own = AddEverywhere(jnp.zeros((20, 64)))
    lines = case[0].intervene(own, Told(jnp.ones(9))).interventions.describe()
    assert lines[0] == "AddEverywhere(value=float32 (20, 64), strength=2.0)"
    assert lines[1].startswith("adds numbers numbers")
    assert len(lines[1]) <= 240
    assert repr(own) == f"<AddEverywhere: {lines[0]}>"
    many = gnb.AblateHeads({i: range(100) for i in range(6)})
    assert "(600 of them)" in repr(many)
    assert len(repr(gnb.Patch("residual", 1, range(900), np.zeros((900, 64))))) < 120
