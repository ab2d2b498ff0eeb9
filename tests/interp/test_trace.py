"""Traces: the same numbers as the module's own, with labels that fit."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import gemma_nb as gnb
from gemma_nb.interp import programs
from gemma_nb.interp.passes import Pass
from gemma_nb.sites import SITES


@pytest.fixture(scope="module")
def sown(tiny_model):
    model, _ = tiny_model
    ids = np.arange(10, 31)
    run = jax.jit(lambda p, t: model.transformer.apply({"params": p}, t, mutable=["intermediates"]))
    return ids, run(model.params, jnp.asarray(ids)[None])[1]["intermediates"]


@pytest.fixture(scope="module")
def trace(tiny_model, sown):
    model, tokenizer = tiny_model
    names = [site.name for site in gnb.list_sites(model)]
    return gnb.trace(model, sown[0], tokenizer=tokenizer, sites=names)


def test_every_site_holds_what_the_module_computed(trace, sown, tiny_model):
    """Padding inside `trace` changes nothing but the order of sums."""
    _, state = sown
    for site in gnb.list_sites(tiny_model[0]):
        if site.home is None:
            continue  # derived; see test_sites.py
        if not site.per_layer:
            expected = site.value(state)[0]
        else:
            expected = np.stack([site.value(state, i)[0] for i in range(3)])
        if site.name == "attention":
            expected = np.swapaxes(expected, 1, 2)
        actual = trace.data[site.name]
        assert actual.shape == expected.shape, site.name
        # Float32 noise, relative to the largest value: residuals reach beyond one.
        noise = 3e-6 * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(actual.values, expected, rtol=0, atol=noise, err_msg=site.name)


def test_attention_is_a_labelled_map(trace):
    maps = trace.attention
    assert maps.dims == ("layer", "head", "query", "key")
    np.testing.assert_allclose(maps.sum("key"), 1, atol=1e-5)
    assert maps.layer_kind.values.tolist() == ["sliding 8", "sliding 8", "global"]
    assert maps.key_token.values.tolist() == list(trace.labels)
    assert maps.kv_group.values.tolist() == [0, 0]
    later = np.triu(np.ones((21, 21), bool), 1)
    assert (maps.values[..., later] == 0).all()
    assert (maps.sel(layer=0).values[:, 20, :13] == 0).all()
    assert (maps.sel(layer=2).values[:, 20, :13] > 0).all()


def test_positions_carry_tokens(trace):
    assert trace.residual.dims == ("layer", "position", "embedding")
    assert trace.residual.token.values.tolist() == list(trace.labels)
    assert trace.embed.dims == ("position", "embedding")
    assert trace.z.dims == ("layer", "position", "head", "head_dim")
    assert trace.k.dims == ("layer", "position", "kv_head", "head_dim")


def test_layers_are_selected(tiny_model, sown, trace):
    some = gnb.trace(tiny_model[0], sown[0], layers=[2, -3])
    assert some.attention.layer.values.tolist() == [0, 2]
    np.testing.assert_allclose(some.attention.sel(layer=2), trace.attention.sel(layer=2), atol=1e-6)
    assert some.labels[0] == "10"


def test_texts_begin_with_bos(tiny_model):
    model, tokenizer = tiny_model
    trace = gnb.trace(model, "Hi", tokenizer=tokenizer)
    assert trace.tokens.tolist() == tokenizer.encode("Hi", bos=True)
    assert trace.labels[0] == "<bos>"
    with pytest.raises(ValueError, match="tokenizer="):
        gnb.trace(model, "Hi")


def test_what_was_not_captured_is_computed_when_it_is_looked_at(tiny_model, trace):
    lazy = gnb.trace(tiny_model[0], trace.tokens, sites=())
    assert "residual" not in lazy.data
    np.testing.assert_allclose(lazy.residual, trace.residual, atol=3e-6)
    assert "residual" in lazy.data
    part = lazy.get("attention", layers=-1, positions=[3, -1], heads=1)
    assert part.dims == ("layer", "head", "query", "key")
    assert part["query"].values.tolist() == [3, 20]
    assert (part["head"].values.tolist(), part.kv_group.values.tolist()) == ([1], [0])
    whole = trace.attention.sel(layer=[2], head=[1], query=[3, 20])
    np.testing.assert_allclose(part, whole, atol=1e-6)
    assert "attention" not in lazy.data
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = lazy.colour


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sites": ["attn"]}, "the sites are"),
        ({"positions": [40]}, "0 to 2"),
        ({"heads": [2]}, "heads 0 to 1"),
        ({"layers": [7]}, "layers 0 to 2"),
    ],
)
def test_unknown_requests_list_the_known_ones(tiny_model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        gnb.trace(tiny_model[0], [1, 2, 3], **kwargs)


@pytest.mark.parametrize("tokens", [[], [[1, 2], [3, 4]], [0.5], [-1], [10**9]])
def test_impossible_tokens_are_refused(tiny_model, tokens):
    with pytest.raises(ValueError, match=r"token ids|tokens_or_text must be"):
        gnb.trace(tiny_model[0], tokens)


def test_requests_that_cannot_fit_are_refused_first():
    model = gnb.GemmaTransformer.from_config(gnb.presets.GEMMA3_27B)
    with pytest.raises(ValueError, match=r"GiB.*layers=\[\.\.\.\] with at most 1"):
        gnb.trace(model, [1] * 4096)
    with pytest.raises(ValueError, match=r"positions=\[\.\.\.\] with at most 4095"):
        gnb.trace(model, [1] * 4097, layers=0)
    with pytest.raises(ValueError, match=r"logits.*positions=\[\.\.\.\] with at most"):
        gnb.trace(model, [1] * 4096, sites="logits")


def test_traces_copy_and_pickle(trace):
    for twin in (copy.copy(trace), pickle.loads(pickle.dumps(trace))):
        assert twin.labels == trace.labels
    assert len(repr(trace)) < 2000


@pytest.fixture(scope="module")
def long_text(tiny_model):
    """Longer than what goes through a layer at once."""
    ids = np.random.default_rng(3).integers(6, 260, 1100)
    return ids, gnb.trace(tiny_model[0], ids, sites=())


def test_long_texts_go_through_a_layer_in_pieces(tiny_model, long_text):
    model, _ = tiny_model
    ids, trace = long_text
    run = jax.jit(lambda p, t: model.transformer.apply({"params": p}, t, mutable=["intermediates"]))
    output, state = run(model.params, jnp.asarray(ids)[None])
    sown = state["intermediates"]
    for layer in range(3):
        block = sown[f"layer_{layer}"]
        np.testing.assert_allclose(trace.residual[layer], block["residual"][0][0], atol=1e-5)
        got = trace.get("attention", layers=layer, heads=1).values[0, 0]
        np.testing.assert_allclose(got, block["attn"]["attention"][0][0, :, 1], atol=1e-5)
        got = trace.get("z", layers=layer, positions=[0, 511, 512, 700, 1099]).values[0]
        expected = block["attn"]["z"][0][0, [0, 511, 512, 700, 1099]]
        np.testing.assert_allclose(got, expected, atol=1e-5)
        rows = trace.get("attention", layers=layer, positions=[3, 600, 1024]).values[0]
        expected = np.swapaxes(block["attn"]["attention"][0][0], 0, 1)[:, [3, 600, 1024]]
        np.testing.assert_allclose(rows, expected, atol=1e-5)
    logits = trace.get("logits", positions=[5, -1])
    np.testing.assert_allclose(logits, output.logits[0, [5, -1]], atol=2e-5)


def test_a_part_that_is_held_is_not_computed_again(long_text, monkeypatch):
    _, trace = long_text
    whole = trace["z"]
    monkeypatch.setattr(trace, "source", None)
    part = trace.get("z", layers=[0, 2], positions=[7, 9])
    np.testing.assert_array_equal(part, whole.sel(layer=[0, 2], position=[7, 9]))
    with pytest.raises(ValueError, match="holds residual, z only"):
        trace.get("q")


def test_fewer_residuals_are_kept_where_all_would_not_fit(tiny_model, long_text, monkeypatch):
    ids, trace = long_text
    monkeypatch.setattr("gemma_nb.interp.passes._KEPT_BYTES", 2 * 4 * 2048 * 32)
    sparse = gnb.Trace(trace.labels_of, {}, Pass(tiny_model[0], ids.astype(np.int32)))
    np.testing.assert_allclose(
        sparse.get("q", layers=1, positions=0), trace.get("q", layers=1, positions=0), atol=1e-6
    )
    np.testing.assert_allclose(sparse.get("final"), trace.get("final"), atol=1e-5)
    assert set(sparse.source._kept) == {0, 2, 3}


def test_half_precision_halves_what_is_kept(tiny_model, trace):
    half = gnb.trace(tiny_model[0], trace.tokens, sites=("attention",), dtype="float16")
    assert half.attention.dtype == np.float16
    np.testing.assert_allclose(half.attention, trace.attention, atol=1e-3)


@pytest.mark.parametrize("ending", [".nc", ".zarr"])
def test_saved_traces_are_read_back(tiny_model, trace, tmp_path, ending):
    roles, turns = ["user"] * 10 + ["model"] * 11, [0] * 10 + [1] * 11
    model, tokenizer = tiny_model
    made = gnb.trace(
        *(model, trace.tokens),
        tokenizer=tokenizer,
        sites=("attention", "residual", "embed"),
        positions=[2, 20],
        turns=turns,
        roles=roles,
    )
    made.data["z"] = made.get("z", layers=[1], heads=0, dtype="float16")
    path = tmp_path / f"trace{ending}"
    made.save(path)
    made.save(path)  # over the one that is there
    loaded = gnb.Trace.load(path)
    assert (loaded.config, loaded.labels, loaded.roles) == (made.config, made.labels, made.roles)
    assert loaded.interventions == made.interventions == ()
    for name in ("attention", "residual", "embed"):
        assert loaded.data[name].identical(made.data[name]), name
    np.testing.assert_array_equal(loaded.z, made.data["z"])
    assert loaded.attention.key_role.values[10] == "model"
    with pytest.raises(AttributeError, match="loaded from a file"):
        _ = loaded.q
    with pytest.raises(ValueError, match=r"\.nc or \.zarr"):
        made.save(tmp_path / "trace.h5")
    xarray.Dataset({"x": ("y", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="scipy")
    with pytest.raises(ValueError, match="no trace"):
        gnb.Trace.load(tmp_path / "other.nc")


def test_zarr_without_its_library_says_what_to_install(trace, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for go in (trace.save, gnb.Trace.load):
        with pytest.raises(ImportError, match="pip install zarr"):
            go(tmp_path / "trace.zarr")


def test_traces_of_one_text_share_its_pass(tiny_model):
    model, _ = tiny_model
    first = gnb.trace(model, [5, 6, 7], layers=0)
    assert gnb.trace(model, [5, 6, 7], layers=1).source is first.source
    for other in (
        gnb.trace(model, [5, 6, 8]),
        gnb.trace(model.intervene(gnb.AblateHeads({0: [0]})), [5, 6, 7]),
        gnb.trace(model.edit("final_norm/scale", lambda w: w), [5, 6, 7]),
    ):
        assert other.source is not first.source


@pytest.mark.parametrize(
    ("held", "more", "edited"),
    [(1090, 10, False), (600, 600, True), (1000, 20, False)],
    ids=["a few", "several pieces, under interventions", "a last piece among what is known"],
)
def test_of_a_text_that_grew_only_what_is_new_is_computed(
    tiny_model, held, more, edited, monkeypatch
):
    model, _ = tiny_model
    if edited:
        cut = gnb.KnockOut(2, queries=slice(500, None), keys=slice(20, 60))
        model = model.intervene(gnb.AblateHeads({0: [1]}), cut)
    ids = np.random.default_rng(held).integers(6, 260, held + more).astype(np.int32)
    other = np.concatenate([ids[:held], [5, 5, 5]]).astype(np.int32)  # went on in another way
    before = gnb.trace(model, other, sites=("residual",))
    plain = Pass(model, ids)
    expected = {i: np.asarray(plain.residual(i))[0, : len(ids)] for i in range(4)}
    maps = plain.capture([SITES["attention"]], (0, 2))["attention"]
    through = []
    run = programs.run_block
    monkeypatch.setattr(programs, "run_block", lambda *a: through.append(a[3]) or run(*a))
    grown = gnb.trace(model, ids, sites=())
    assert grown.source is not before.source
    np.testing.assert_allclose(grown.residual, [expected[i + 1] for i in range(3)], atol=1e-5)
    assert not any(through), "the whole text went through a layer"
    for layer in (0, 2):
        got = grown.get("attention", layers=layer, heads=1).values[0, 0]
        np.testing.assert_allclose(got, maps[layer // 2, 1], atol=1e-5)
