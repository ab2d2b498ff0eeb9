"""The sampler's distribution, against its definition in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_nb.cpu.top_k import top_k
from gemma_nb.sampling.draw import draw, invert, uniform_at
from gemma_nb.sampling.filters import Controls, distribution, seeded
from gemma_nb.sampling.settings import Sampling

VOCABULARY = 4096 * 16  # large enough for the two-level search and the shortlist


def definition(logits: np.ndarray, s: Sampling, seen: np.ndarray) -> np.ndarray:
    """Probabilities by sorting everything, in float64, in the documented order."""
    x = logits.astype(np.float64)
    if s.repetition_penalty is not None:
        r = s.repetition_penalty
        x = np.where(seen, np.where(x > 0, x / r, x * r), x)
    x[list(s.forbidden)] = -np.inf
    if s.temperature == 0:
        return (np.arange(x.size) == x.argmax()).astype(float)
    x = x / s.temperature
    order = np.argsort(-x, kind="stable")
    keep = np.ones(x.size, bool)
    if s.top_k is not None:
        keep[order[s.top_k :]] = False
    if s.top_p is not None and s.top_p < 1:
        p = softmax(np.where(keep, x, -np.inf))[order]
        keep[order[np.sum(np.cumsum(p) - p < s.top_p) :]] = False
    if s.min_p is not None:
        keep &= x >= x.max() + (np.log(s.min_p) if s.min_p else -np.inf)
    return softmax(np.where(keep, x, -np.inf))


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


@jax.jit
def probabilities(logits, controls, seen):
    return distribution(logits, controls, seen).probability(jnp.arange(logits.shape[0]))


@jax.jit
def draws(logits, controls, positions):
    seen = jnp.zeros(logits.shape, bool)
    dist = distribution(logits, controls, seen)
    numbers = jax.vmap(lambda position: uniform_at(controls, position))(positions)
    return jax.vmap(lambda uniform: draw(dist, controls, uniform))(numbers)


def random_logits(seed: int, spread: float, size: int = VOCABULARY) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.7]),
    top_k=st.none() | st.sampled_from([1, 5, 64, 256, 257, 3000]),
    top_p=st.none() | st.sampled_from([0.01, 0.5, 0.95, 0.999, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 0.02, 0.3]),
    repetition_penalty=st.none() | st.sampled_from([0.8, 1.0, 1.3]),
    forbidden=st.just(()) | st.just((0, 17, 100)),
    seed=st.just(0),
)


@given(sampling=samplings, seed=st.integers(0, 50), spread=st.sampled_from([0.3, 2.0, 6.0]))
def test_probabilities_are_those_of_the_definition(sampling, seed, spread):
    logits = random_logits(seed, spread)
    seen = np.random.default_rng(seed + 1).random(VOCABULARY) < 0.3
    expected = definition(logits, sampling, seen)
    controls = Controls.of(sampling, VOCABULARY)
    actual = np.asarray(probabilities(logits, controls, jnp.asarray(seen)))
    # Float32 has no numbers below 1e-45.
    expected[expected < 1e-35] = 0
    actual = np.where(actual < 1e-35, 0, actual)
    # Tokens at the very edge of a nucleus may fall on either side of it, since its sum is rounded;
    # what that moves is a ten-thousandth of the probability at most.
    assert np.abs(actual - expected).sum() / 2 < 1e-4
    settled = (actual == 0) == (expected == 0)
    tolerance = 3e-6 + 3e-4 * expected.max()
    np.testing.assert_allclose(actual[settled], expected[settled], atol=tolerance)
    assert actual.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("top_p", [0.02, 0.4, 0.9, 0.999, None])
@pytest.mark.parametrize("top_k", [1, 300, 2000, None])
def test_what_equals_the_last_one_kept_is_kept(top_k, top_p):
    """Of thousands of tokens with few different logits; more than a shortlist holds."""
    logits = np.round(random_logits(5, 1.5, 6000))
    logits[logits == logits.max()] -= 1  # so that the likeliest ones are many, too
    sampling = Sampling(top_k=top_k, top_p=top_p, seed=0)
    actual = np.asarray(
        probabilities(logits, Controls.of(sampling, logits.size), jnp.zeros(logits.size, bool))
    )
    least = logits[definition(logits, sampling, np.zeros(logits.size, bool)) > 0].min()
    expected = softmax(np.where(logits >= least, logits, -np.inf).astype(np.float64))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_only_what_has_weight_is_found():
    rng = np.random.default_rng(0)
    w = rng.random(500).astype(np.float32) * (rng.random(500) < 0.1)
    targets = np.r_[0, np.cumsum(w), w.sum() * rng.random(2000), 2 * w.sum()].astype(np.float32)
    found, rest = jax.vmap(invert, (None, 0))(jnp.asarray(w), jnp.asarray(targets))
    assert (w[np.asarray(found)] > 0).all()
    before = np.cumsum(w) - w
    np.testing.assert_allclose(before[found] + rest, targets, rtol=1e-5, atol=1e-6)
    inside = targets < w.sum() * (1 - 1e-6)
    assert (np.asarray(rest)[inside] > -1e-5).all()
    assert (np.asarray(rest)[inside] <= w[found][inside] + 1e-5).all()


@pytest.mark.parametrize("size", [40, 300, 1000])
def test_small_vocabularies(size):
    logits = random_logits(3, 2.0, size)
    sampling = Sampling(temperature=0.8, top_k=30, top_p=0.9, seed=0)
    actual = probabilities(logits, Controls.of(sampling, size), jnp.zeros(size, bool))
    expected = definition(logits, sampling, np.zeros(size, bool))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@given(seed=st.integers(0, 1000), k=st.sampled_from([1, 3, 10, 64]), ties=st.booleans())
def test_two_level_top_k_is_exact(seed, k, ties):
    x = random_logits(seed, 3.0)
    x = np.round(x) if ties else x
    values, indices = jax.jit(top_k, static_argnums=1)(jnp.asarray(x), k)
    order = np.argsort(-x, kind="stable")[:k]
    np.testing.assert_array_equal(values, x[order])
    np.testing.assert_array_equal(indices, order)


def test_draws_follow_the_distribution():
    """Chi-square over the tokens that are expected at least ten times."""
    logits = random_logits(0, 2.0, 1000)
    controls = Controls.of(Sampling(top_p=0.9, seed=7), 1000)
    count = 40_000
    tokens = np.asarray(draws(logits, controls, jnp.arange(count)))
    p = definition(logits, Sampling(top_p=0.9), np.zeros(1000, bool))
    observed = np.bincount(tokens, minlength=1000)
    assert (observed[p == 0] == 0).all()
    common = p * count >= 10
    expected = p[common] * count
    chi2 = ((observed[common] - expected) ** 2 / expected).sum()
    degrees = common.sum() - 1
    # Mean `degrees`, standard deviation sqrt(2 * degrees); the seed is fixed.
    assert abs(chi2 - degrees) < 4 * np.sqrt(2 * degrees)


def test_same_key_and_position_draw_the_same():
    logits = random_logits(0, 1.0, 500)
    first = draws(logits, Controls.of(Sampling(seed=1), 500), jnp.arange(50))
    again = draws(logits, Controls.of(Sampling(seed=1), 500), jnp.arange(50))
    other = draws(logits, Controls.of(Sampling(seed=2), 500), jnp.arange(50))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(set(np.asarray(first).tolist())) > 10


def test_greedy_takes_the_first_of_equals():
    logits = np.zeros(300, np.float32)
    logits[[120, 40]] = 5.0
    controls = Controls.of(Sampling(temperature=0, seed=0), 300)
    assert set(np.asarray(draws(logits, controls, jnp.arange(20))).tolist()) == {40}


def test_settings_are_not_compiled_in():
    logits = jnp.asarray(random_logits(0, 1.0, 512))
    seen = jnp.zeros(512, bool)
    probabilities(logits, Controls.of(Sampling(seed=0), 512), seen)
    compiled = probabilities._cache_size()
    for sampling in (
        Sampling(temperature=0, seed=3),
        Sampling(top_k=9, top_p=0.3, min_p=0.1, repetition_penalty=2.0, forbidden=(4,), seed=5),
    ):
        probabilities(logits, Controls.of(sampling, 512), seen)
    assert probabilities._cache_size() == compiled


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -1.0),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("stop", ("",)),
        # What JSON of another program, a form or a slip may give.
        ("temperature", True),
        ("temperature", "0.5"),
        ("temperature", [1.0]),
        ("top_k", "40"),
        ("top_k", 40.5),
        ("top_k", True),
        ("seed", "7"),
        ("seed", 2**32),
        ("stop", 3),
        ("stop", [None]),
        ("stop", b"END"),
        ("stop", {"END": 1}),
        ("forbidden", "12"),  # a text is no list of digits
        ("forbidden", [1.5]),
        ("forbidden", {"1": 2}),
        # What float32 rounds to 0 or infinity, or what logits become when divided by it.
        ("temperature", 1e-46),
        ("temperature", 1e-40),
        ("temperature", 1e39),
        ("temperature", 10**400),
        ("top_p", 1e-46),
        ("min_p", 1e-40),
        ("repetition_penalty", 1e-46),
        ("repetition_penalty", 1e39),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"stop": None, "forbidden": None, "temperature": None, "max_new_tokens": None}, {}),
        ({"stop": ["a", "b"], "forbidden": [1, 2]}, {"stop": ("a", "b"), "forbidden": (1, 2)}),
        ({"top_k": 40.0, "seed": 3.0}, {"top_k": 40, "seed": 3}),
        ({"top_k": np.int64(40), "top_p": np.float64(0.5)}, {"top_k": 40, "top_p": 0.5}),
        (
            {"temperature": np.array(0.5), "min_p": jnp.float32(0.5)},
            {"temperature": 0.5, "min_p": 0.5},
        ),
        ({"forbidden": np.arange(3)}, {"forbidden": (0, 1, 2)}),
        ({"forbidden": 7}, {"forbidden": (7,)}),
    ],
)
def test_settings_are_taken_as_json_and_numpy_spell_them(given, plain):
    sampling = Sampling(**given)
    assert sampling == Sampling(**plain)
    kinds = {type(value) for value in dataclasses.astuple(sampling)}
    assert kinds <= {int, float, tuple, type(None)}  # so that they can be stored and hashed


@pytest.mark.parametrize("temperature", [1e-24, 1e24])
@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_a_token_is_drawn_at_the_edge_of_what_is_allowed(temperature, penalty):
    """Logits of 1e5 are far beyond those of any model."""
    logits = jnp.asarray(random_logits(0, 3e4, 512))
    sampling = Sampling(temperature, min_p=1e-24, top_p=0.9, repetition_penalty=penalty, seed=0)
    seen = jnp.arange(512) % 2 == 0
    p = np.asarray(probabilities(logits, Controls.of(sampling, 512), seen))
    assert p.sum() == pytest.approx(1, abs=1e-4)


def test_a_lone_stop_string_is_one_stop_string():
    assert Sampling(stop="END").stop == ("END",)


def test_forbidden_ids_must_exist_and_leave_one():
    with pytest.raises(ValueError, match="0 to 9"):
        Controls.of(Sampling(seed=0, forbidden=(10,)), 10)
    with pytest.raises(ValueError, match="none is left"):
        Controls.of(Sampling(seed=0, forbidden=tuple(range(10))), 10)


def test_recommended_settings_come_from_the_checkpoint(tiny_model):
    import gemma_nb as gnb

    model, _ = tiny_model
    assert Sampling.recommended(model) == Sampling()
    info = gnb.presets.ModelInfo("x", "X", "instruction")
    tuned = Sampling.recommended(model.replace(info=info), seed=4)
    assert (tuned.temperature, tuned.top_k, tuned.top_p, tuned.seed) == (1.0, 64, 0.95, 4)
    assert dataclasses.replace(tuned, top_k=None).top_k is None


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA's CPU backend compiles it")
def test_what_a_caller_takes_of_the_largest_does_not_make_it_sort_all_candidates():
    def some(x):
        values, ids = top_k(x, 64)
        return values[0], values[:5], ids[:7]

    x = jnp.asarray(np.random.default_rng(0).normal(size=1 << 14), jnp.float32)
    compiled = jax.jit(some).lower(x).compile()
    sorts = [line for line in compiled.as_text().splitlines() if " sort(" in line]
    assert not [line for line in sorts if "[4096]" in line]  # 64 blocks of 64
    np.testing.assert_array_equal(compiled(x)[1], np.sort(x)[::-1][:5])


@pytest.mark.parametrize("default", ["threefry2x32", "rbg"])
def test_a_seed_makes_the_key_that_jax_makes_of_it(default):
    """A key of threefry, whatever generator is the default: a seed draws the same everywhere."""
    with jax.default_prng_impl(default):
        for seed in (0, 7, 2**31, 2**32 - 1):
            made, expected = seeded(seed), jax.random.key(seed, impl="threefry2x32")
            assert made.dtype == expected.dtype
            assert jax.random.key_data(made).tolist() == jax.random.key_data(expected).tolist()
