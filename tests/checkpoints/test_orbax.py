from __future__ import annotations

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_nb import presets
from gemma_nb.checkpoints import layout, orbax
from gemma_nb.errors import CheckpointError
from tests.checkpoints import tiny, written


def test_orbax_itself_reads_what_is_saved(tmp_path):
    """As google-deepmind/gemma does: names with slashes, and `w` in the feed-forward."""
    params = written.params()
    path = orbax.save_params(params, tiny.CONFIG, tmp_path / "saved")
    with written.quiet(), ocp.StandardCheckpointer() as checkpointer:
        flat = checkpointer.restore(path)
    assert set(flat["transformer/layer_1/mlp/linear"]) == {"w"}
    assert set(flat["transformer/layer_1/attn/_key_norm"]) == {"scale"}
    expected = layout.released(params)
    assert jax.tree.structure(flat) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, flat, expected))


def test_the_configuration_is_saved_along(tmp_path):
    params = jax.tree.map(jax.numpy.asarray, written.params())
    path = orbax.save_params(layout.released(params), tiny.CONFIG, tmp_path / "saved")
    assert orbax.OrbaxFolder(path).config == tiny.CONFIG


def test_saving_refuses_what_it_could_not_read_back(tmp_path):
    params = written.params()
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists already; choose another path"):
        orbax.save_params(params, tiny.CONFIG, tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"embedder/input_embedding: expected shape"):
        orbax.save_params(params, presets.GEMMA3_270M, tmp_path / "new")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    with pytest.raises(CheckpointError, match="input_embedding has a shape but no weights"):
        orbax.save_params(shapes, tiny.CONFIG, tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*; make room there"):
        orbax.save_params(params, tiny.CONFIG, tmp_path / "file" / "new")
    assert not (tmp_path / "new").exists()


def test_a_configuration_that_is_given_is_not_looked_for(tmp_path):
    folder = tmp_path / "nested"
    written.save_tree(written.params(), folder)
    with pytest.raises(CheckpointError, match="of no released size"):
        orbax.OrbaxFolder(folder)
    assert orbax.OrbaxFolder(folder, tiny.CONFIG).config == tiny.CONFIG


@pytest.mark.parametrize("piece", [1, 1 << 26])
def test_arrays_in_chunks_are_read_in_pieces(tmp_path, monkeypatch, piece):
    params = written.params()
    tree = layout.released(params)
    chunks = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=512), tree)
    with written.quiet(), ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", tree, save_args=chunks)
    monkeypatch.setattr(orbax, "_PIECE", piece)
    folder = orbax.OrbaxFolder(tmp_path / "x", tiny.CONFIG)
    reads = []
    monkeypatch.setattr(orbax, "_rows_at_once", spy(orbax._rows_at_once, reads))
    actual = dict(folder.params(np.float32))
    assert all(np.array_equal(actual[p], a) for p, a in layout.flatten(params).items())
    assert (min(reads) < tiny.CONFIG.num_embed) == (piece == 1)


def spy(function, results):
    def wrapped(*args):
        results.append(function(*args))
        return results[-1]

    return wrapped


def test_zarr3_arrays_are_read(tmp_path):
    params = written.params()
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True)
    with written.quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "x", args=ocp.args.PyTreeSave(params))
    assert json.loads((tmp_path / "x" / "_METADATA").read_text())["use_zarr3"]
    actual = dict(orbax.OrbaxFolder(tmp_path / "x", tiny.CONFIG).params(np.float32))
    assert all(np.array_equal(actual[p], a) for p, a in layout.flatten(params).items())


def test_a_checkpoint_with_stacked_layers_is_refused_by_name(tmp_path):
    tree = layout.released(written.params())
    tree["transformer/stacked_layers/attention_type_0/attn/q_einsum"] = {"w": np.ones((2, 3))}
    written.save_tree(tree, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"stacked_layers/.* stacked layers, which is not"):
        orbax.OrbaxFolder(tmp_path / "x", tiny.CONFIG)
