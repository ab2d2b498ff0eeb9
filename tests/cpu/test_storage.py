"""Other storages of a weight, against products in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb.config import Global, LayerSpec, TransformerConfig
from gemma_nb.cpu.calibration import SAMPLE
from gemma_nb.cpu.fusion import materialize
from gemma_nb.cpu.products import IN_STREAMS, bfloat16_terms, product, split_bfloat16
from gemma_nb.cpu.quantise import quantise, typical
from gemma_nb.cpu.storage import Columns, FloatRows, Int8Rows, Stored, pack
from gemma_nb.nn import Transformer
from gemma_nb.processor import Streams

OUT, INNER = 96, 160


@pytest.fixture(scope="module")
def weight():
    return jax.random.normal(jax.random.key(0), (OUT, INNER)).astype(jnp.bfloat16)


def tokens(count, seed=1):
    return jax.random.normal(jax.random.key(seed), (count, INNER)) * 3


def exact(x, rows):
    return np.asarray(x, np.float64) @ np.asarray(rows.astype(jnp.float32), np.float64).T


def error(y, expected):
    return np.abs(np.asarray(y, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("kind", ["rows", "streams", "columns", "wide"])
def test_float_storages_are_as_exact_as_float32(weight, count, kind):
    x = tokens(count)
    several = {"columns": Columns(weight.T), "wide": FloatRows(weight.astype(jnp.float32))}
    stored = Stored(FloatRows(weight, 4 if kind == "streams" else 1), several.get(kind))
    y = jax.jit(lambda s, x: s(x))(stored, x)
    assert y.dtype == jnp.float32
    plain = error(x @ weight.T.astype(jnp.float32), exact(x, weight))
    assert error(y, exact(x, weight)) < max(2 * plain, 5e-7)


def test_bfloat16_activations_stay_bfloat16(weight):
    x = tokens(3).astype(jnp.bfloat16)
    for count in (1, 3):
        y = jax.jit(lambda s, x: s(x))(Stored(FloatRows(weight), Columns(weight.T)), x[:count])
        assert y.dtype == jnp.bfloat16
        assert error(y.astype(jnp.float32), exact(x[:count].astype(jnp.float32), weight)) < 2**-8


def test_rounded_activations_are_multiplied_once(weight):
    """What is rounded to bfloat16 is multiplied exactly; a single token, and float32, are not."""
    x = tokens(7)
    short = x.astype(jnp.bfloat16).astype(jnp.float32)
    times = jax.jit(lambda s, x: s(x))
    y = times(Stored(FloatRows(weight), Columns(weight.T, rounded=True)), x)
    assert y.dtype == jnp.float32
    assert error(y, exact(short, weight)) < 5e-7
    assert 1e-4 < error(y, exact(x, weight)) < 2**-8
    wide = Stored(FloatRows(weight), FloatRows(weight.astype(jnp.float32)))
    assert error(times(wide, x), exact(x, weight)) < 5e-7
    narrow = Stored(FloatRows(weight), Columns(weight.T, rounded=True))
    assert error(times(narrow, x[:1]), exact(x[:1], weight)) < 5e-7


def test_extreme_activations_are_split_exactly(weight):
    """From subnormal to enormous, and exact zeros."""
    x = tokens(4) * jnp.asarray([1e-38, 1e30, 0.0, 1e-5])[:, None]
    y = jax.jit(lambda s, x: s(x))(Stored(FloatRows(weight), Columns(weight.T)), x)
    expected = exact(x, weight)
    for row in (1, 3):
        assert error(y[row], expected[row]) < 5e-7
    assert (y[2] == 0).all()


def test_bfloat16_terms_add_up():
    x = tokens(5)
    assert (sum(np.asarray(t, np.float64) for t in bfloat16_terms(x)) == x).all()
    for rounded, most in ((False, 2**-7), (True, 2**-8)):
        upper, rest = split_bfloat16(x, rounded=rounded)
        assert (np.asarray(upper, np.float64) + np.asarray(rest, np.float64) == x).all()
        assert (np.abs(rest) <= most * np.abs(x)).all()


def config_of(layers):
    return TransformerConfig(
        num_embed=32,
        embed_dim=16,
        hidden_dim=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8.0,
        layers=(LayerSpec(Global()),) * layers,
    )


@pytest.mark.parametrize(("layers", "exact_ones"), [(3, {2}), (8, {7})])
def test_what_is_prepared_of_a_model(layers, exact_ones):
    """The joined product instead of its parts; int8 but for the last layer."""
    transformer = Transformer(config_of(layers))
    params = transformer.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    prepared = transformer.prepare(params, int8=True)
    for i in range(layers):
        layer = prepared[f"layer_{i}"]
        assert set(layer["attn"]) == {"qkv", "attn_vec_einsum"}
        kinds = {stored.one.rows.dtype for stored in (layer["attn"]["qkv"], layer["mlp"]["linear"])}
        assert kinds == {jnp.dtype(jnp.float32 if i in exact_ones else jnp.int8)}


def test_what_is_not_finite_stays_so(weight):
    for bad in (jnp.nan, jnp.inf):
        y = Stored(FloatRows(weight), Columns(weight.T))(tokens(2).at[0, 3].set(bad))
        assert not np.isfinite(y[0]).any()
        assert np.isfinite(y[1]).all()


def test_sums_may_be_reassociated_and_nothing_else(weight):
    """What a program is told so that it reads in streams leaves NaN, infinity and functions be."""
    options = IN_STREAMS if jax.default_backend() == "cpu" else None
    stored, x = Stored(FloatRows(weight, streams=4)), tokens(1)
    times = jax.jit(lambda s, x: s(x), compiler_options=options)
    assert error(times(stored, x), exact(x, weight)) < 5e-7
    assert not np.isfinite(times(stored, x.at[0, 3].set(jnp.nan))).any()
    odd = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 1.0])
    finite = jax.jit(jnp.isfinite, compiler_options=options)
    assert finite(odd).tolist() == [False, False, False, True]
    angles = jnp.asarray(np.random.default_rng(0).uniform(0, 32_768, 1000), jnp.float32)
    for function in (jnp.sin, jnp.cos, jnp.exp, jnp.log, jnp.tanh):
        given = angles if function in (jnp.sin, jnp.cos) else angles / 500
        compiled = jax.jit(function, compiler_options=options)
        np.testing.assert_allclose(compiled(given), jax.jit(function)(given), rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_int8_rows(weight, power):
    uneven = weight * jnp.linspace(0.1, 9, INNER, dtype=jnp.bfloat16)
    rows, scale, inputs = quantise(uneven, power)
    assert rows.dtype == jnp.int8
    assert int(jnp.abs(rows.astype(jnp.int32)).max(axis=1).min()) == 127
    step = scale[:, None] * inputs
    restored = rows.astype(jnp.float32) * step
    assert (jnp.abs(restored - uneven.astype(jnp.float32)) <= 0.501 * step).all()
    x = tokens(1)
    y = jax.jit(lambda s, x: s(x))(Stored(Int8Rows(rows, scale, inputs)), x)
    assert error(y, exact(x, restored)) < 1e-6


def test_what_meets_large_activations_is_rounded_finely():
    """Of two inputs with the same weights, the one whose activations are 10,000 times larger."""
    row = jax.random.normal(jax.random.key(1), (64, 1))
    weight = jnp.concatenate([row, row], axis=1)
    _, _, inputs = quantise(weight, 0.5, jnp.array([1e-2, 1e2]))
    assert float(inputs[0] / inputs[1]) == pytest.approx(10)
    plain = quantise(weight, 0.5)
    for same in (quantise(weight, 0.5, jnp.ones(2)), quantise(weight, 0.5, jnp.zeros(2))):
        # Activations that are all the same, or all zero, tell nothing.
        np.testing.assert_array_equal(same[0], plain[0])


def test_the_first_vector_says_nothing_about_what_is_typical():
    x = jnp.array([[1e4, 1e4], [3.0, 0.0], [4.0, 1.0]], jnp.bfloat16)
    np.testing.assert_allclose(typical(x), [12.5**0.5, 0.5**0.5], rtol=1e-6)


def test_int8_is_chosen_by_what_the_layers_compute():
    """Activations on the sample of text, each layer's after the ones below; over a plain pass."""
    config = config_of(3)
    transformer = Transformer(config)
    tokens = jnp.array([SAMPLE], jnp.int32) % config.num_embed
    params = transformer.init(jax.random.key(0), tokens)["params"]
    prepared = transformer.prepare(params, int8=True)
    _, state = transformer.apply({"params": params}, tokens, mutable=["intermediates"])
    for i in range(config.num_layers - 1):
        (x,) = state["intermediates"][f"layer_{i}"]["mlp_in"]
        gating = params[f"layer_{i}"]["mlp"]["gating_einsum"].reshape(-1, config.embed_dim)
        expected = quantise(gating, 0.5, typical(x[0]))
        found = prepared[f"layer_{i}"]["mlp"]["gating_einsum"]
        np.testing.assert_allclose(found.one.inputs, expected[2], rtol=1e-4)


@pytest.mark.parametrize("columns", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("int8", [False, True])
def test_every_storage_stands_for_the_weight(weight, int8, columns):
    """A packed weight says its storage, and materialises to the weight."""
    plain = Stored(FloatRows(weight), Columns(weight.T), jnp.ones(INNER))
    options = {"rounded": False, "columns": columns, "streams": Streams()}
    packed = pack({"w": plain}, int8=int8, **options)["w"]
    expected = np.asarray(weight, np.float32)
    np.testing.assert_allclose(packed.one.materialise(), expected, atol=0.05 if int8 else 0)
    text = "int8 rows for one vector" if int8 else "bfloat16 rows for one vector"
    if columns == jnp.float32:
        text += ", float32 rows for several"
        np.testing.assert_array_equal(packed.several.materialise(), expected)
    elif columns is not None:
        text += ", bfloat16 columns for several"
        np.testing.assert_array_equal(packed.several.materialise(), expected.T)
    assert packed.describe() == text


def test_rows_and_columns_of_zeros_stay_zeros():
    rows, scale, inputs = quantise(jnp.zeros((2, 5)))
    assert (rows == 0).all()
    assert (scale == 1).all()
    assert (inputs == 1).all()


def test_products_keep_leading_axes(weight):
    x = tokens(6).reshape(2, 3, INNER)
    assert product(x, weight).shape == (2, 3, OUT)
    assert Stored(FloatRows(weight), Columns(weight.T))(x).shape == (2, 3, OUT)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int16, jnp.int8])
def test_materialize_changes_nothing(dtype):
    x = jnp.asarray([127, 3, -128], dtype)
    assert (jax.jit(materialize)(x) == x).all()
