"""The model: its parameter tree, its cache, and what may see what."""

import dataclasses
from functools import partial

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.config import Global, LayerSpec, Sliding, TransformerConfig, interleave
from gemma_nb.nn.attention import attend
from gemma_nb.nn.masks import visible
from gemma_nb.nn.rope import Rotation, apply_rope

BASE = TransformerConfig(
    num_embed=64,
    embed_dim=16,
    hidden_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=interleave(2, window=5, pattern=(False, True), global_scale=8.0),
    query_pre_attn_scalar=8,
)
CONFIGS = {
    "gqa": BASE,
    "mqa": dataclasses.replace(BASE, num_kv_heads=1),
    "mha": dataclasses.replace(BASE, num_kv_heads=4),
    "gemma2-like": dataclasses.replace(
        BASE, use_qk_norm=False, attn_logits_soft_cap=5.0, final_logit_soft_cap=3.0
    ),
    "gemma1-like": dataclasses.replace(
        BASE,
        use_qk_norm=False,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        transpose_gating_einsum=False,
        layers=(LayerSpec(Global()),) * 2,
    ),
}
LENGTH = 19


def make(config: TransformerConfig) -> gnb.GemmaTransformer:
    """A random model whose weights are large enough for attention to be uneven."""
    model = gnb.GemmaTransformer.from_config(config, key=jax.random.key(1))
    rng = np.random.default_rng(0)
    return model.replace(
        params=jax.tree.map(
            lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), model.params
        )
    )


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return make(CONFIGS[request.param])


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, LENGTH)), jnp.int32)


@partial(jax.jit, static_argnums=0, static_argnames=("return_last_only", "return_hidden_states"))
def run(transformer, params, tokens, **kwargs):
    return transformer.apply({"params": params}, tokens, **kwargs)


@partial(jax.jit, static_argnums=0)
def see(transformer, variables, tokens):
    return transformer.apply(variables, tokens, mutable=["intermediates"])


def forward(model, tokens, **kwargs):
    return run(model.transformer, model.params, tokens, **kwargs)


def intermediates(model, tokens):
    return see(model.transformer, {"params": model.params}, tokens)[1]["intermediates"]


def assert_close(actual, expected):
    # Float32 sums of a few hundred terms, in another order.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_official_parameter_tree():
    model = gnb.GemmaTransformer.from_config(gnb.presets.GEMMA3_270M)
    shapes = {
        "/".join(str(key.key) for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
    }
    layer = {name[8:]: shape for name, shape in shapes.items() if name.startswith("layer_0/")}
    assert layer == {
        "attn/_key_norm/scale": (256,),
        "attn/_query_norm/scale": (256,),
        "attn/attn_vec_einsum/w": (4, 256, 640),
        "attn/kv_einsum/w": (2, 1, 640, 256),
        "attn/q_einsum/w": (4, 640, 256),
        "mlp/gating_einsum": (2, 2048, 640),
        "mlp/linear": (2048, 640),
        "post_attention_norm/scale": (640,),
        "post_ffw_norm/scale": (640,),
        "pre_attention_norm/scale": (640,),
        "pre_ffw_norm/scale": (640,),
    }
    assert {n: s for n, s in shapes.items() if not n.startswith("layer_")} == {
        "embedder/input_embedding": (262_144, 640),
        "final_norm/scale": (640,),
    }
    assert len(shapes) == 2 + 18 * len(layer)


@pytest.mark.parametrize("name", gnb.presets.PRESETS)
def test_parameter_counts(name):
    """What `num_params` says without building anything; `test_config` has the published numbers."""
    config = gnb.presets.by_name(name)
    model = gnb.GemmaTransformer.from_config(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == config.num_params()


def test_multi_head_checkpoints_hold_one_qkv_weight():
    params = make(CONFIGS["mha"]).params["layer_0"]["attn"]
    assert params["qkv_einsum"]["w"].shape == (3, 4, 16, 8)
    assert "q_einsum" not in params


@pytest.mark.parametrize("columns", [None, jnp.float32], ids=["rows", "wide"])
@pytest.mark.parametrize("times", [1, 3], ids=["few", "many"])
def test_prepared_weights_compute_the_same(model, tokens, columns, times):
    """The logits, and all that is seen on the way, of so few tokens that they stand in columns."""
    tokens = jnp.concatenate([tokens] * times, axis=1)
    prepared = model.transformer.prepare(model.params, columns=columns)
    variables = {"params": model.params, "prepared": prepared}
    output, seen = see(model.transformer, variables, tokens)
    plain, expected = see(model.transformer, {"params": model.params}, tokens)
    assert_close(output.logits, plain.logits)
    jax.tree.map(assert_close, seen, expected)
    assert set(prepared["layer_0"]) == {"attn", "mlp"}


def test_decoding_token_by_token_equals_the_full_pass(model, tokens):
    expected = forward(model, tokens).logits
    cache = model.transformer.init_cache(batch_size=2, dtype=jnp.float32, cache_length=24)
    for t in range(LENGTH):
        output = forward(model, tokens[:, t : t + 1], cache=cache)
        cache = output.cache
        assert_close(output.logits[:, 0], expected[:, t])
    assert cache["layer_0"]["end_index"].tolist() == [LENGTH, LENGTH]


def test_padded_chunks_equal_the_full_pass(model, tokens):
    """Chunks padded on the right leave the cache as bare ones do, in each row by its own length."""
    expected = forward(model, tokens).logits
    cache = model.transformer.init_cache(batch_size=2, dtype=jnp.float32, cache_length=LENGTH)
    for start, stop in ((0, 7), (7, 8), (8, LENGTH)):  # padded by 4, 10 and 0: one program
        chunk = jnp.pad(tokens[:, start:stop], ((0, 0), (0, LENGTH - 8 - (stop - start))))
        positions = jnp.broadcast_to(start + jnp.arange(chunk.shape[1]), chunk.shape)
        positions = jnp.where(positions < stop, positions, -1)
        output = forward(model, chunk, cache=cache, positions=positions)
        cache = output.cache
        assert_close(output.logits[:, : stop - start], expected[:, start:stop])
    np.testing.assert_array_equal(cache["layer_1"]["positions"][0], np.arange(LENGTH))


def test_rows_of_a_batch_may_differ_in_length(model, tokens):
    cache = model.transformer.init_cache(batch_size=2, dtype=jnp.float32, cache_length=LENGTH)
    lengths = np.array([[5], [9]])
    positions = jnp.asarray(np.where(np.arange(9) < lengths, np.arange(9), -1))
    cache = forward(model, tokens[:, :9], cache=cache, positions=positions).cache
    following = jnp.stack([tokens[0, 5:7], tokens[1, 9:11]])
    output = forward(model, following, cache=cache)
    full = forward(model, tokens).logits
    assert_close(output.logits, jnp.stack([full[0, 5:7], full[1, 9:11]]))


def test_last_only_and_hidden_states(model, tokens):
    full = forward(model, tokens, return_hidden_states=True)
    last = forward(model, tokens, return_last_only=True, return_hidden_states=True)
    assert last.logits.shape == (2, 64)
    assert_close(last.logits, full.logits[:, -1])
    assert_close(last.hidden_states, full.hidden_states[:, -1])
    unembedded = model.transformer.apply(
        {"params": model.params}, full.hidden_states, method="unembed"
    )
    assert_close(unembedded, full.logits)


def test_last_only_skips_padding(model, tokens):
    """Padding is a position of -1, or token id 0 as google-deepmind/gemma pads."""
    last = forward(model, tokens).logits[:, 6]
    padded = jnp.pad(tokens[:, :7], ((0, 0), (0, LENGTH - 7)))
    assert_close(forward(model, padded, return_last_only=True).logits, last)
    other = padded.at[:, 7:].set(5)
    positions = jnp.where(jnp.arange(LENGTH) < 7, jnp.arange(LENGTH), -1)[None].repeat(2, 0)
    assert_close(forward(model, other, positions=positions, return_last_only=True).logits, last)


@pytest.mark.parametrize("batch", [(), (2, 1), (1, 2)])
def test_any_number_of_batch_axes(tokens, batch):
    model = make(CONFIGS["gemma2-like"])
    count = int(np.prod(batch))
    cache = model.transformer.init_cache(batch_size=count, dtype=jnp.float32, cache_length=LENGTH)
    expected = forward(model, tokens[:count], cache=cache, return_hidden_states=True)

    def unflatten(tree):
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), tree)

    output = forward(
        model, unflatten(tokens[:count]), cache=unflatten(cache), return_hidden_states=True
    )
    for actual, wanted in zip(*map(jax.tree.leaves, (output, unflatten(expected))), strict=True):
        assert actual.shape == wanted.shape
        assert_close(actual, wanted)


def test_a_text_model_refuses_images(tokens):
    model = make(BASE)
    with pytest.raises(ValueError, match="this is a text model"):
        forward(model, tokens, images=jnp.zeros((1, 8, 8, 3), jnp.uint8))


def test_what_samplers_of_others_look_up():
    """`INFO`, `config.input_config` and `config.init_cache` of gm's TransformerLike."""
    transformer = gnb.nn.Transformer(gnb.presets.GEMMA2_9B)
    assert transformer.INFO.tokenizer_version == 2
    assert transformer.INFO.default_ckpt == "gs://gemma-data/checkpoints/gemma2-9b-it"
    assert gnb.nn.Transformer(gnb.presets.GEMMA1_2B).INFO.default_ckpt is None
    assert gnb.nn.Transformer(BASE).INFO.tokenizer_version is None
    assert not transformer.config.input_config.support_images
    arguments = {"batch_size": 2, "dtype": jnp.bfloat16, "cache_length": 8}
    cache = BASE.init_cache(**arguments)
    assert cache["layer_1"]["k"].shape == (2, 8, 2, 8)
    assert jax.tree.structure(cache) == jax.tree.structure(
        gnb.nn.Transformer(BASE).init_cache(**arguments)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_embedding_multiplier_is_rounded_to_the_dtype_of_the_table(dtype):
    config = dataclasses.replace(BASE, embed_dim=40)
    model = make(config)
    params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    sown = intermediates(model.replace(params=params), jnp.asarray([[3]]))
    row = params["embedder"]["input_embedding"][3].astype(jnp.float32)
    expected = row * jnp.sqrt(jnp.float32(40)).astype(dtype).astype(jnp.float32)
    assert sown["embed"][0].dtype == jnp.float32
    np.testing.assert_allclose(sown["embed"][0][0, 0], expected, rtol=1e-6)


def test_causal_by_gradient(model, tokens):
    """The logits at t depend on tokens up to t, inside the window, and on no later one."""
    embedded = jnp.zeros((1, LENGTH, 16))

    def logit(nudge, t):
        def encode(next_fun, args, kwargs, context):
            x = next_fun(*args, **kwargs)
            return x + nudge if context.method_name == "encode" else x

        with flax.linen.intercept_methods(encode):
            return model.transformer.apply({"params": model.params}, tokens[:1]).logits[0, t, 0]

    reach = np.abs(jax.jit(jax.grad(logit), static_argnums=1)(embedded, 10)).sum(axis=(0, 2))
    assert (reach[:11] > 0).all()
    assert (reach[11:] == 0).all()


def test_soft_caps_bound_what_they_cap(tokens):
    model = make(CONFIGS["gemma2-like"])
    assert np.abs(forward(model, tokens).logits).max() < 3.0
    free = dataclasses.replace(model.config, final_logit_soft_cap=None)
    uncapped = model.replace(config=free, transformer=gnb.nn.Transformer(free))
    logits = forward(uncapped, tokens).logits
    assert_close(3.0 * np.tanh(logits / 3.0), forward(model, tokens).logits)


def test_every_site_is_sown_with_its_shape(model, tokens):
    sown = intermediates(model, tokens)
    c = model.config
    sizes = {"B": 2, "T": LENGTH, "S": LENGTH, "N": c.num_heads, "K": c.num_kv_heads}
    sizes |= {"H": c.head_dim, "D": c.embed_dim, "F": c.hidden_dim}
    for site in gnb.list_sites(model):
        if site.home is None:  # derived from others, in gemma_nb.interp
            continue
        value = site.value(sown, 1 if site.per_layer else None)
        assert value.shape == tuple(sizes[axis] for axis in site.dims), site.name


def test_residual_is_the_sum_of_its_parts(model, tokens):
    sown = intermediates(model, tokens)
    total = sown["embed"][0]
    for i in range(model.config.num_layers):
        total = total + sown[f"layer_{i}"]["attn_out"][0] + sown[f"layer_{i}"]["mlp_out"][0]
    assert_close(total, sown["layer_1"]["residual"][0])


def test_callers_mask_replaces_the_causal_rule_but_not_the_window():
    positions = jnp.arange(6)[None]
    given = jnp.ones((1, 6, 6), bool)
    assert visible(positions, positions, Global(), given).all()
    near = visible(positions, positions, Sliding(2), given)[0]
    assert near[5].tolist() == [False, False, False, False, True, True]
    assert near[0].tolist() == [True, True, False, False, False, False]
    with pytest.raises(ValueError, match="covers 4 key slots, but there are 6"):
        visible(positions, positions, Global(), given[..., :4])


def test_window_edge():
    """A window of w holds the query's own position and the w - 1 before it."""
    positions = jnp.arange(10)[None]
    seen = visible(positions, positions, Sliding(3))[0]
    assert np.flatnonzero(seen[7]).tolist() == [5, 6, 7]


def test_positions_alone_decide_not_slots(model, tokens):
    """Segments packed into one row, with positions that restart, cannot be told apart by position:
    a caller's mask keeps them apart, and then each is scored as if it were alone."""
    second = LENGTH - 6
    packed = jnp.concatenate([tokens[:1, :6], tokens[1:, :second]], axis=1)
    positions = jnp.asarray([[*range(6), *range(second)]])
    segment = jnp.asarray([0] * 6 + [1] * second)
    mask = (segment[:, None] == segment) & (positions[0][:, None] >= positions[0])
    output = forward(model, packed, positions=positions, attention_mask=mask[None])
    alone = forward(model, tokens).logits
    assert_close(output.logits[0, :6], alone[0, :6])
    assert_close(output.logits[0, 6:], alone[1, :second])


def test_rope_depends_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(p, s, **kwargs):
        spec = LayerSpec(Global(), rope_base=100.0, **kwargs)
        turns = [Rotation.of(jnp.asarray([[i]]), 8, spec) for i in (p, s)]
        rotated = [apply_rope(x, turn) for x, turn in zip((q, k), turns, strict=True)]
        return float(jnp.vdot(*rotated))

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)
    assert score(72, 32, rope_scale=8.0) == pytest.approx(score(9, 4), abs=1e-5)


def test_decode_branch_equals_the_general_one():
    """The plain-matrix branch for one query and one key-value head, against two equal queries."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 1, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(1, 12, 1, 8)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(rng.random((1, 1, 12)) < 0.7)
    weights, gathered = attend(q, k, v, mask, soft_cap=2.0)
    twice = attend(jnp.tile(q, (1, 2, 1, 1)), k, v, jnp.tile(mask, (1, 2, 1)), soft_cap=2.0)
    assert_close(weights[0, 0], twice[0][0, 1])
    assert_close(gathered[0, 0], twice[1][0, 1])
    assert (np.asarray(weights)[0, 0][:, ~np.asarray(mask)[0, 0]] == 0).all()


def test_bfloat16_weights_compute_in_float32(tokens):
    model = make(BASE)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    from_low = forward(model.replace(params=low), tokens).logits
    assert from_low.dtype == jnp.float32
    assert_close(from_low, forward(model.replace(params=exact), tokens).logits)
