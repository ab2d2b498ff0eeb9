"""Interventions: exact where they act, nothing elsewhere, the same in every kind of pass."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma_nb as gnb
from gemma_nb import model as model_module
from gemma_nb.interventions import Intervention
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.settings import Sampling
from tests.parity.cases import RANDOM, model_of


class NoPytree(Intervention):
    sites = ("residual",)


@flax.struct.dataclass
class Elsewhere(Intervention):
    sites = ("somewhere",)


IDS = np.random.default_rng(5).integers(6, 260, 24)


@pytest.fixture(scope="module")
def case():
    """A grouped-query model of six layers, three sliding layers to a global one."""
    return model_of(RANDOM["grouped-query"]), RANDOM["grouped-query"].tokens()[:24]


def logits(model, ids):
    return model(gnb.GemmaInputs(np.asarray(ids))).values


def assert_close(a, b, atol=3e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


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


# --- every kind of pass -----------------------------------------------------------------------

numbers = st.integers(0, 30)
some_positions = st.one_of(
    st.none(), st.lists(numbers, min_size=2, max_size=2), st.builds(slice, numbers, numbers)
)
layer = st.integers(0, 2)
rng = np.random.default_rng(0)
VECTOR = rng.normal(size=32).astype(np.float32)
ROWS = np.abs(rng.normal(size=(2, 6))).astype(np.float32)


def in_sight(query):
    """A query's weights on the last six keys that it sees, all within the window."""
    row = np.zeros(query + 1, np.float32)
    row[-6:] = ROWS[0, : query + 1]
    return row


interventions = st.one_of(
    st.builds(lambda i, p: gnb.AblateHeads({i: [1]}, positions=p), layer, some_positions),
    st.builds(lambda i, p: gnb.ScaleHeads({i: {0: 3.0}}, positions=p), layer, some_positions),
    st.builds(lambda i, p: gnb.AblateMLP([i], positions=p), layer, some_positions),
    st.builds(lambda i, p: gnb.Steer(i, VECTOR, 2.0, positions=p), layer, some_positions),
    st.builds(lambda i, p: gnb.EditNeuron(i, 5, 9.0, positions=p), layer, some_positions),
    st.builds(lambda i, q, k: gnb.KnockOut(i, queries=q, keys=k), layer, *[some_positions] * 2),
    st.builds(
        lambda i, p: gnb.Patch("residual_mid", i, [p, p + 1], VECTOR[None] * [[1], [2]]),
        layer,
        numbers,
    ),
    st.builds(lambda i, p: gnb.Patch("k", i, p, VECTOR[None, :16]), layer, numbers),
    st.builds(lambda i, p: gnb.ReplaceAttention(i, 1, [in_sight(p)], queries=p), layer, numbers),
    st.builds(lambda p: gnb.ForceToken(p, 9), numbers),
)


@pytest.mark.filterwarnings("ignore::gemma_nb.errors.InterventionWarning")
@settings(max_examples=8)
@given(st.lists(interventions, min_size=1, max_size=2), st.sampled_from([0, 0, 7, 26]))
def test_cached_decoding_equals_the_full_pass(tiny_model, items, start):
    model = tiny_model[0].intervene(*items, start=start)
    decoder = Decoder(model, limit=64, top_k=8)
    evidences = [decoder.prefill(decoder.begin(IDS.tolist(), Sampling(temperature=0, seed=0)))]
    evidences += [decoder.step() for _ in range(5)]
    tokens = [*IDS.tolist(), *(int(e.token) for e in evidences)]
    # One length, so that hypothesis waits for few compilations.
    whole = np.asarray(jax.nn.log_softmax(logits(model, tokens)))
    for i, evidence in enumerate(evidences):
        expected = whole[len(IDS) - 1 + i]
        assert_close(evidence.logprobs, expected[evidence.ids], atol=5e-5)


@pytest.mark.parametrize(
    ("layer", "query", "message"),
    [
        (2, 3, "a weight from query 3 on key 4, which comes later"),
        (0, 13, "from query 13 on key 0, which has left the layer's window.*gnb.trace"),
    ],
)
def test_weights_on_what_a_cache_does_not_hold_are_refused(tiny_model, layer, query, message):
    """Decoded they would be other numbers than those of a pass over the whole text."""
    model, tokenizer = tiny_model
    changed = model.intervene(gnb.ReplaceAttention(layer, 1, ROWS[:1], queries=[query]))
    trace = gnb.trace(changed, IDS)
    row = trace.attention.sel(layer=layer, head=1, query=query, key=slice(0, 5))
    np.testing.assert_array_equal(row, ROWS[0])
    with pytest.raises(ValueError, match=message):
        Decoder(changed, limit=64, top_k=8)
    with pytest.raises(ValueError, match=message):
        gnb.ChatSession(changed, tokenizer, template="none")


def test_a_chat_that_refuses_weights_goes_on(tiny_model):
    sampling = Sampling(seed=1, max_new_tokens=12)
    chat = gnb.ChatSession(*tiny_model, template="none", sampling=sampling)
    first = chat.chat("Hello")
    with pytest.raises(ValueError, match="from query 14 on key 0, which has left"):
        chat.intervene(gnb.ReplaceAttention(0, 1, ROWS[:1], queries=[14]))
    assert chat.turns[-1] == first
    # What is before the reply does not act.
    row = np.eye(15, 6, dtype=np.float32)[[5]]
    early = gnb.ReplaceAttention(0, 1, [*ROWS[:1], *row], queries=[3, 9])
    assert chat.intervene(early, at=1).tokens[0] == first.tokens[0]
    assert len(chat.chat("More").tokens) == 12


def test_values_that_change_do_not_compile_the_step_again(tiny_model):
    model, _ = tiny_model
    decoder = Decoder(model.intervene(gnb.Steer(1, VECTOR)), limit=64, top_k=8)
    decoder.prefill(decoder.begin(IDS.tolist(), Sampling(seed=0)))
    decoder.step()
    compiled = decoder._programs.decode_step.feed.count()
    decoder.intervene(model.intervene(gnb.Steer(2, -VECTOR, 3.0)).interventions)
    decoder.prefill(decoder.begin(IDS.tolist(), Sampling(seed=0)))
    decoder.step()
    assert decoder._programs.decode_step.feed.count() == compiled


def test_a_change_keeps_what_it_does_not_concern_in_the_cache(tiny_model):
    model, _ = tiny_model
    decoder = Decoder(model, limit=64, top_k=8)
    greedy = Sampling(temperature=0, seed=0)
    decoder.prefill(decoder.begin(IDS.tolist(), greedy))
    changed = model.intervene(gnb.AblateHeads({0: [0]}), start=15)
    decoder.intervene(changed.interventions)
    assert decoder.ids == IDS[:15].tolist()
    evidence = decoder.prefill(decoder.begin(IDS.tolist(), greedy))
    expected = np.asarray(jax.nn.log_softmax(logits(changed, IDS)))[-1]
    assert_close(evidence.logprobs, expected[evidence.ids], atol=5e-5)
    decoder.intervene(changed.interventions)
    assert len(decoder.ids) == len(IDS)
    decoder.intervene(None)
    assert decoder.ids == IDS[:15].tolist()
    evidence = decoder.prefill(decoder.begin(IDS.tolist(), greedy))
    expected = np.asarray(jax.nn.log_softmax(logits(model, IDS)))[-1]
    assert_close(evidence.logprobs, expected[evidence.ids], atol=5e-5)


def test_a_steering_vector_is_the_mean_difference_of_prompts(case):
    model, ids = case
    sides = [ids[:6], ids[3:11]], [ids[10:20]]
    vector = gnb.steering_vector(model, *sides, layer=3)
    last = [[gnb.trace(model, x).residual.values[3, -1] for x in side] for side in sides]
    assert_close(vector, np.mean(last[0], axis=0) - np.mean(last[1], axis=0), atol=1e-5)
    mean = gnb.steering_vector(model, [ids[:6]], [ids[10:20]], 3, positions="mean")
    rows = [gnb.trace(model, x).residual.values[3, 1:].mean(0) for x in (ids[:6], ids[10:20])]
    assert_close(mean, rows[0] - rows[1], atol=1e-5)
    model.intervene(gnb.Steer(3, vector, 2.0))
    with pytest.raises(ValueError, match="residual stream"):
        gnb.steering_vector(model, *sides, layer=3, site="z")
    with pytest.raises(ValueError, match="at least one prompt"):
        gnb.steering_vector(model, [], [ids], layer=3)


def test_what_is_optimised_is_traced(case):
    """Steps that are compiled equal those in Python: gradients, patched values, scales, batches."""
    model, ids = case

    def loss(vector, scale):
        under = model.intervene(
            gnb.Steer(2, vector, scale),
            gnb.Patch("residual", 3, [5, 6], vector),
            gnb.ScaleHeads({1: {0: scale}}),
            gnb.EditNeuron(1, 3, scale),
        )
        assert "traced float32 (64,)" in str(under.interventions) or not isinstance(
            vector, jax.core.Tracer
        )
        given = {"params": under.params}
        output = under.transformer.apply(
            given, jnp.asarray(ids)[None], interventions=under.interventions
        )
        return -jax.nn.log_softmax(output.logits[0, -1])[5]

    vector, scale = np.linspace(-1, 1, 64, dtype=np.float32), np.float32(0.5)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(vector, scale)
    step = 1e-2
    moved = loss(vector, scale + step), loss(vector, scale - step)
    np.testing.assert_allclose(gradients[1], (moved[0] - moved[1]) / (2 * step), rtol=2e-2)
    assert np.abs(gradients[0]).max() > 0
    several = jax.jit(jax.vmap(loss, in_axes=(0, None)))(np.stack([vector, -vector]), scale)
    np.testing.assert_allclose(several, [loss(vector, scale), loss(-vector, scale)], atol=2e-5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda i: gnb.Steer(i, np.ones(64)), "layer"),
        (lambda i: gnb.KnockOut(1, queries=i), "positions"),
        (lambda i: gnb.KnockOut(1, keys=slice(0, i)), "positions"),
        (lambda i: gnb.KnockOut(1, [i]), "heads"),
        (lambda i: gnb.AblateHeads({1: [i]}), "heads"),
        (lambda i: gnb.AblateMLP([i]), "layers"),
        (lambda i: gnb.EditNeuron(1, i, 2.0), "neuron"),
    ],
)
def test_where_an_intervention_acts_is_not_traced(case, make, name):
    with pytest.raises(ValueError, match=f"{name} is traced by jax.jit"):
        jax.jit(lambda i: case[0].intervene(make(i)).params)(3)


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
