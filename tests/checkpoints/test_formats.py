"""The same weights in every format are the same params."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.checkpoints import layout
from gemma_nb.checkpoints import load as front_door
from tests.checkpoints import tiny, written

pytestmark = pytest.mark.usefixtures("cache", "no_compilation_cache")
every = pytest.mark.parametrize("write", written.LOSSLESS.values(), ids=written.LOSSLESS.keys())


def assert_same(actual, expected, dtype):
    flat = layout.flatten(actual)
    assert set(flat) == set(layout.flatten(expected))
    for path, array in layout.flatten(expected).items():
        assert isinstance(flat[path], jax.Array)
        assert flat[path].dtype == dtype
        assert np.array_equal(np.asarray(flat[path]), array.astype(dtype)), path


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_weights_are_loaded_bit_by_bit(write, dtype, tmp_path):
    params = written.params()
    path = write(tmp_path / "checkpoint", params)
    config, loaded, info, tokenizer = front_door.load_params(path, dtype=dtype, progress=False)
    assert config == tiny.CONFIG
    assert_same(loaded, params, {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype])
    assert tokenizer.vocab_size == tiny.CONFIG.num_embed
    assert info.tuning == "base"


@pytest.mark.parametrize("name", ["Orbax flat", "Orbax nested", "safetensors in shards"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_weights_are_loaded_bit_by_bit(name, dtype, tmp_path):
    params = written.params(ml_dtypes.bfloat16)
    path = written.LOSSLESS[name](tmp_path / "checkpoint", params)
    loaded = front_door.load_params(path, dtype=dtype, progress=False)[1]
    assert_same(loaded, params, {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype])


def test_q8_0_is_within_half_a_step_of_its_blocks(tmp_path):
    params = written.params()
    path = written.gguf_file(tmp_path, params, quantize=True)
    loaded = layout.flatten(front_door.load_params(path, dtype="float32", progress=False)[1])
    for leaf in layout.leaves(tiny.CONFIG):
        exact = layout.flatten(params)[leaf.path]
        if leaf.is_norm:
            assert np.array_equal(np.asarray(loaded[leaf.path]), exact)
            continue
        for matrix, original in zip(
            leaf.split(np.asarray(loaded[leaf.path])), leaf.split(exact), strict=True
        ):
            blocks = original.reshape(-1, 32)
            step = np.abs(blocks).max(axis=1, keepdims=True) / 127
            # A block's step is rounded to float16, which moves its largest value by 127 / 2048.
            assert (np.abs(matrix.reshape(-1, 32) - blocks) <= 0.57 * step).all()


def test_what_a_model_saves_is_what_is_loaded_again(tmp_path):
    config, params, *_ = front_door.load_params(
        written.gguf_file(tmp_path, written.params()), progress=False
    )
    path = written.orbax_saved(tmp_path / "saved", params)
    again = front_door.load_params(path, progress=False)
    assert again[0] == config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again[1], params))


def test_a_folder_computes(tmp_path):
    model, tokenizer = gnb.load(written.hugging_face(tmp_path, written.params()), progress=False)
    tokens = tokenizer.encode("the th", bos=True)
    logits = model(gnb.GemmaInputs.from_basic_segments(tokens))
    assert logits.shape == (len(tokens), tiny.CONFIG.num_embed)
    assert np.isfinite(logits.values).all()


def test_progress_of_a_folder_goes_up_to_one(tmp_path, capfd):
    path = written.hugging_face(tmp_path, written.params())
    reports = []
    gnb.load(path, progress=lambda *report: reports.append(report))
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert len(reports) > len(list(layout.leaves(tiny.CONFIG)))
    assert capfd.readouterr() == ("", "")


def test_nothing_is_written_for_a_folder(tmp_path, cache):
    before = sorted(written.hugging_face(tmp_path / "hf", written.params()).iterdir())
    gnb.load(tmp_path / "hf", progress=False)
    assert sorted((tmp_path / "hf").iterdir()) == before
    assert not (cache / "weights").exists()


@pytest.mark.parametrize("write", [written.hugging_face, written.orbax_flat])
def test_parameters_are_handed_to_jax_without_a_copy(write, tmp_path, monkeypatch):
    """JAX takes over memory that is aligned to 64 bytes."""
    path = write(tmp_path / "checkpoint", written.params())
    handed = []
    put = jax.device_put
    monkeypatch.setattr(
        jax, "device_put", lambda array, where=None: handed.append(array) or put(array, where)
    )
    params = layout.flatten(front_door.load_params(path, progress=False)[1])
    assert len(handed) == len(params)
    for array, leaf in zip(handed, params.values(), strict=True):
        assert leaf.unsafe_buffer_pointer() == array.ctypes.data
