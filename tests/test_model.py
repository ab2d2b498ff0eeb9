"""GemmaTransformer: what it is made from, scores with labelled axes, edited copies."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.text import Text

import gemma_nb as gnb
from gemma_nb.checkpoints import layout
from gemma_nb.config import Global, Sliding
from gemma_nb.presets import ModelInfo


def score(model, tokens, **inputs):
    return model(gnb.GemmaInputs(jnp.asarray(tokens, jnp.int32), **inputs)).values


def spread_out(model):
    """The same model with weights of a size at which positions and masks matter."""
    return model.edit("**", lambda w: 10 * w)


# what it is made from


def test_without_a_key_there_are_shapes_and_no_weights():
    model = gnb.GemmaTransformer.from_config(gnb.presets.GEMMA3_27B)
    leaf = model.params["embedder"]["input_embedding"]
    assert isinstance(leaf, jax.ShapeDtypeStruct)
    assert leaf.shape == (262_144, 5376)
    with pytest.raises(ValueError, match="shapes in place of weights"):
        score(model, [1, 2])


def test_a_key_gives_random_weights(tiny_model):
    config = tiny_model[0].config
    one, same, other = (
        gnb.GemmaTransformer.from_config(config, key=jax.random.key(seed)) for seed in (1, 1, 2)
    )
    table = [x.params["embedder"]["input_embedding"] for x in (one, same, other)]
    assert np.array_equal(table[0], table[1])
    assert not np.array_equal(table[0], table[2])
    assert np.isfinite(score(one, [1, 2, 3])).all()


LAYOUTS = {
    "nested": lambda params: params,
    "below params": lambda params: {"params": params},
    "below transformer": lambda params: {"transformer": params},
    "flat": layout.released,
    "multimodal": lambda params: {**params, "vision_encoder": {"w": np.zeros(3)}},
    "numpy": lambda params: jax.tree.map(np.asarray, params),
}


@pytest.mark.parametrize("spelling", LAYOUTS)
def test_params_in_memory_are_taken_in_every_layout(tiny_model, spelling):
    model, _ = tiny_model
    again = gnb.GemmaTransformer.from_pretrained(
        LAYOUTS[spelling](model.params), config=model.config
    )
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again.params))
    assert np.array_equal(score(again, [3, 1, 4]), score(model, [3, 1, 4]))


def test_a_released_size_is_recognised_by_its_shapes():
    shapes = gnb.GemmaTransformer.from_config(gnb.presets.GEMMA3_1B).params
    model = gnb.GemmaTransformer.from_pretrained(layout.released(shapes))
    assert model.config == gnb.presets.GEMMA3_1B


def test_an_unknown_size_asks_for_what_no_shape_tells(tiny_model):
    model, _ = tiny_model
    with pytest.raises(gnb.CheckpointError, match=r"no released size .* layers"):
        gnb.GemmaTransformer.from_pretrained(model.params)


def test_params_of_another_model_are_refused(tiny_model):
    model, _ = tiny_model
    with pytest.raises(gnb.CheckpointError, match="input_embedding: expected shape"):
        gnb.GemmaTransformer.from_pretrained(model.params, config=gnb.presets.GEMMA3_270M)


def test_activations_are_in_the_params_dtype_or_in_float32(tiny_model):
    model, _ = tiny_model
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), spread_out(model).params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    exact = score(model.replace(params=rounded), [3, 1, 4, 1, 5])

    def loaded(upcast):
        return gnb.GemmaTransformer.from_pretrained(params, upcast, config=model.config)

    for upcast in (False, True):
        assert {str(x.dtype) for x in jax.tree.leaves(loaded(upcast).params)} == {"bfloat16"}
        assert loaded(upcast).params["final_norm"]["scale"] is params["final_norm"]["scale"]
    far = np.abs(score(loaded(False), [3, 1, 4, 1, 5]) - exact).max()
    near = np.abs(score(loaded(True), [3, 1, 4, 1, 5]) - exact).max()
    assert near < far / 20


def test_saved_and_loaded_it_is_the_same(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_nb.checkpoints.load.use_compilation_cache", lambda: None)
    model, tokenizer = tiny_model
    folder = model.save(tmp_path / "saved")
    assert folder == tmp_path / "saved"
    tokenizer.save_model(folder / "tokenizer.model")
    again, _ = gnb.load(folder, dtype="float32", progress=False)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(model.params), dict(again.params)))
    with pytest.raises(gnb.CheckpointError, match="exists already"):
        model.save(folder)


def test_what_does_not_fit_is_refused_before_it_is_read_unless_forced(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("gemma_nb.checkpoints.load.use_compilation_cache", lambda: None)
    model, tokenizer = tiny_model
    folder = model.save(tmp_path / "saved")
    tokenizer.save_model(folder / "tokenizer.model")
    monkeypatch.setattr("gemma_nb.checkpoints.memory.available", lambda: 100_000)
    with pytest.raises(gnb.CheckpointError, match=r"takes about 190 kB, and .* 100 kB free"):
        gnb.load(folder, dtype="float32", progress=False)
    forced, _ = gnb.load(folder, dtype="float32", force=True, progress=False)
    assert forced.config == model.config


class Foreign:
    """Another implementation, with the interface of google-deepmind/gemma's modules."""

    INFO = SimpleNamespace(tokenizer_version=3, default_ckpt=None)

    def __init__(self, config) -> None:
        self.own = gnb.nn.Transformer(config)
        sliding = config.layers[0].kind.window
        kinds = ["GLOBAL" if spec.kind == Global() else "LOCAL_SLIDING" for spec in config.layers]
        self.config = SimpleNamespace(
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)},
            final_logit_softcap=config.final_logit_soft_cap,
            attention_types=[SimpleNamespace(name=kind) for kind in kinds],
            query_pre_attn_norm=SimpleNamespace(name="BY_ONE_OVER_SQRT_HEAD_DIM"),
            sliding_window_size=sliding,
            local_base_frequency=10_000,
            local_scale_factor=1.0,
            global_base_frequency=1_000_000,
            global_scale_factor=1.0,
        )
        self.calls = 0

    def apply(self, variables, tokens, *, images=None, attention_mask=None, **kwargs):
        self.calls += 1
        assert attention_mask is not None  # gm's own default takes token 0 for padding
        assert images is None
        return self.own.apply(variables, tokens, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("variables", [lambda p: p, lambda p: {"params": p}])
def test_another_implementation_computes_behind_the_same_interface(tiny_model, variables):
    model, _ = tiny_model
    foreign = Foreign(model.config)
    wrapped = gnb.GemmaTransformer.wrap(foreign, variables(model.params))
    assert wrapped.config.layers == model.config.layers
    np.testing.assert_allclose(score(wrapped, [3, 0, 4]), score(model, [3, 0, 4]), atol=1e-6)
    assert foreign.calls == 1  # once: it is traced, then compiled
    assert wrapped.output_structure() == model.output_structure()
    silent = wrapped.edit("layer_*/mlp/linear", np.zeros_like)
    assert np.abs(score(silent, [3, 0, 4]) - score(model, [3, 0, 4])).max() > 1e-5


def test_our_own_module_is_taken_as_it_is(tiny_model):
    model, _ = tiny_model
    again = gnb.GemmaTransformer.wrap(model.transformer, {"params": model.params})
    assert again.transformer is model.transformer
    assert (again.config, again.params) == (model.config, model.params)


def test_what_is_no_gemma_is_not_wrapped(tiny_model):
    model, _ = tiny_model
    with pytest.raises(ValueError, match="is not the configuration of a Gemma 1, 2 or 3"):
        gnb.GemmaTransformer.wrap(SimpleNamespace(config=SimpleNamespace()), model.params)


# calling it


def test_scores_carry_axes_and_agree_with_the_module(tiny_model):
    model, _ = tiny_model
    tokens = jnp.asarray([3, 1, 4, 1, 5])
    scores = model(gnb.GemmaInputs.from_basic_segments(tokens))
    assert scores.dims == ("seq", "vocabulary")
    expected = model.transformer.apply({"params": model.params}, tokens[None]).logits[0]
    np.testing.assert_allclose(scores.values, expected, atol=1e-6)


def test_batches_keep_their_axis(tiny_model):
    model, _ = tiny_model
    tokens = np.array([[3, 1, 4], [1, 5, 9]])
    scores = model(gnb.GemmaInputs.from_basic_segments(tokens))
    assert scores.dims == ("batch", "seq", "vocabulary")
    alone = model(gnb.GemmaInputs.from_basic_segments(tokens[1]))
    np.testing.assert_allclose(scores[1].values, alone.values, atol=1e-6)


def test_positions_and_masks_are_passed_on(tiny_model):
    model = spread_out(tiny_model[0])
    tokens = [3, 1, 4, 1]
    plain = score(model, tokens)
    # Rotary positions are relative: all of them shifted changes nothing.
    np.testing.assert_allclose(plain, score(model, tokens, positions=jnp.arange(4) + 7), atol=1e-4)
    assert np.abs(score(model, tokens, positions=3 * jnp.arange(4)) - plain).max() > 1e-2
    blind = score(model, tokens, attention_mask=jnp.eye(4, dtype=bool))
    assert np.abs(blind - plain)[1:].max() > 1e-2


@pytest.mark.parametrize("lengths", [(3, 11, 3), (11, 11)])
def test_packed_texts_score_as_they_do_alone(tiny_model, lengths):
    """Longer than the window of 8 as well, which counts positions and not places in the row."""
    model = spread_out(tiny_model[0])
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, model.config.num_embed, n) for n in lengths]
    tokens = np.concatenate([*texts, [0, 0]])
    segments = np.repeat([*range(1, 1 + len(texts)), 0], [*lengths, 2])
    packed = score_packed(model, tokens, segments)
    alone = np.concatenate([score(model, text) for text in texts])
    np.testing.assert_allclose(packed[: len(alone)], alone, atol=2e-4, rtol=1e-4)
    assert np.isfinite(packed).all()
    together = score_packed(model, np.stack([tokens, tokens]), np.stack([segments, segments]))
    np.testing.assert_allclose(together[1], packed, atol=2e-4, rtol=1e-4)


def score_packed(model, tokens, segments):
    return model(gnb.GemmaInputs.from_packed_segments(tokens, segments)).values


def test_positions_restart_with_every_packed_text():
    inputs = gnb.GemmaInputs.from_packed_segments([5, 6, 7, 8, 9, 0], [1, 1, 2, 2, 1, 0])
    assert inputs.positions.tolist() == [0, 1, 0, 1, 0, -1]
    assert inputs.attention_mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],  # the same number further on is another text
        [0, 0, 0, 0, 0, 0],
    ]
    with pytest.raises(ValueError, match=r"expected \(2,\), got \(3,\)"):
        gnb.GemmaInputs.from_packed_segments([1, 2], [1, 1, 1])


@pytest.mark.parametrize("tokens", [[], [[[1]]], [10**6], [-1]])
def test_impossible_tokens_are_refused(tiny_model, tokens):
    model, _ = tiny_model
    with pytest.raises(ValueError, match=r"tokens? .*must"):
        model(gnb.GemmaInputs.from_basic_segments(jnp.asarray(tokens, jnp.int32)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"positions": jnp.arange(2)}, r"positions must be \(3,\) for tokens \(3,\), got \(2,\)"),
        ({"attention_mask": jnp.ones((2, 3), bool)}, r"attention_mask must be \(3, 3\)"),
    ],
)
def test_positions_and_masks_of_another_shape_are_refused(tiny_model, inputs, message):
    with pytest.raises(ValueError, match=message):
        score(tiny_model[0], [1, 2, 3], **inputs)


# structure


def test_inputs_and_output_are_named_sized_and_typed(tiny_model):
    model, _ = tiny_model
    inputs, output = model.input_structure(), model.output_structure()
    assert list(inputs) == ["tokens", "positions", "attention_mask"]
    assert inputs["tokens"].dims == ("batch", "seq")
    assert inputs["attention_mask"].dims == ("batch", "seq", "key")
    assert [x.dtype for x in inputs.values()] == ["int32", "int32", "bool"]
    assert [x.optional for x in inputs.values()] == [False, True, True]
    assert output.sizes == {"batch": None, "seq": None, "vocabulary": model.config.num_embed}
    scores = model(gnb.GemmaInputs.from_basic_segments([[1, 2], [3, 4]]))
    assert (scores.dims, str(scores.dtype)) == (output.dims, output.dtype)
    assert scores.sizes["vocabulary"] == output.sizes["vocabulary"]


def test_a_model_is_a_pytree_of_its_parameters(tiny_model):
    model, _ = tiny_model
    doubled = jax.tree.map(lambda x: 2 * x, model)
    assert isinstance(doubled, gnb.GemmaTransformer)
    assert doubled.config is model.config
    assert len(repr(model)) < 200
    assert "sliding" not in repr(model)
    assert {type(spec.kind) for spec in model.config.layers} == {Global, Sliding}


# edits


def changed(before, after):
    """Paths of the parameters that are not the very same arrays."""
    old, new = (layout.flatten(model.params) for model in (before, after))
    assert list(old) == list(new)
    return {"/".join(path) for path in old if old[path] is not new[path]}


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("layer_1/attn/q_einsum/w", {"layer_1/attn/q_einsum/w"}),
        ("layer_*/mlp/linear", {f"layer_{i}/mlp/linear" for i in range(3)}),
        ("layer_[02]/attn/*_einsum/w", {
            f"layer_{i}/attn/{name}/w" for i in (0, 2)
            for name in ("q_einsum", "kv_einsum", "attn_vec_einsum")
        }),
        ("**/_key_norm/scale", {f"layer_{i}/attn/_key_norm/scale" for i in range(3)}),
        ("embedder/**", {"embedder/input_embedding"}),
        ("/final_norm/scale/", {"final_norm/scale"}),
    ],
)  # fmt: skip
def test_an_edit_changes_what_matches_and_shares_the_rest(tiny_model, glob, expected):
    model, _ = tiny_model
    before = {path: np.array(x) for path, x in layout.flatten(model.params).items()}
    edited = model.edit(glob, lambda w: w + 1)
    assert changed(model, edited) == expected
    for path, leaf in layout.flatten(edited.params).items():
        offset = 1 if "/".join(path) in expected else 0
        np.testing.assert_array_equal(leaf, before[path] + np.float32(offset))
    for path, leaf in layout.flatten(model.params).items():  # the original is as it was
        np.testing.assert_array_equal(leaf, before[path])
    assert (edited.config, edited.transformer) == (model.config, model.transformer)


def test_an_edited_model_computes_differently_and_the_original_does_not(tiny_model):
    model, _ = tiny_model
    before = score(model, [3, 1, 4])
    silent = model.edit("layer_*/attn/attn_vec_einsum/w", np.zeros_like)
    assert np.abs(score(silent, [3, 1, 4]) - before).max() > 1e-4
    np.testing.assert_array_equal(score(model, [3, 1, 4]), before)


def test_edited_models_are_told_apart_wherever_they_are_named(tiny_model):
    model = tiny_model[0].replace(info=ModelInfo("gemma3-270m", "Gemma 3 270M"))
    edited = model.edit("layer_0/mlp/linear", lambda w: 0 * w)
    twice = edited.edit("**/scale", lambda w: w + 1).edit("layer_0/mlp/linear", lambda w: w + 1)
    other = model.replace(params=jax.tree.map(lambda w: 2 * w, model.params))
    titles = [x.title for x in (model, edited, twice, other)]
    assert titles == [
        "Gemma 3 270M",
        "Gemma 3 270M, edited (layer_0/mlp/linear)",
        "Gemma 3 270M, edited (layer_0/mlp/linear, **/scale)",
        "Gemma 3 270M, edited (other parameters)",
    ]
    assert titles[1] in repr(edited)
    trace = gnb.trace(edited, [3, 4, 5], sites=())
    assert trace.get("residual", 0).attrs["model"] == gnb.logit_lens(trace, 1).attrs["model"]
    assert trace.model_title == titles[1]
    norms = gnb.residual_norms(trace)
    words = [t.get_text() for t in gnb.plots.residual_norms(norms).findobj(Text)]
    assert any(f"computed with {titles[1]}" in " ".join(word.split()) for word in words)
    # What changes no number of the checkpoint keeps its name.
    for same in (model.intervene(), model.replace(params=model.params)):
        assert same.title == titles[0]


def test_edits_that_cannot_be_are_refused(tiny_model):
    model, _ = tiny_model
    with pytest.raises(ValueError, match=r"no parameter matches .* layer_\*/mlp/linear"):
        model.edit("layer_9/*", lambda w: w)
    with pytest.raises(ValueError, match=r"final_norm/scale: expected .* \(32,\) .* got \(\)"):
        model.edit("final_norm/*", lambda w: w.sum())
