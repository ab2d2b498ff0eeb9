from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_nb.checkpoints import layout, safetensors, safetensors_files, sources
from gemma_nb.checkpoints.safetensors import HuggingFaceFolder
from gemma_nb.errors import CheckpointError
from tests.checkpoints import tiny, written

VOCABULARY = tiny.CONFIG.num_embed
HEAD = "lm_head.weight"


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [np.float32, ml_dtypes.bfloat16])
def test_every_float_type_is_rounded_once(tmp_path, stored, wanted):
    params = written.params(stored)
    folder = written.hugging_face(tmp_path, params)
    for path, array in HuggingFaceFolder(folder, VOCABULARY).params(wanted):
        assert array.dtype == wanted
        assert array.flags.c_contiguous
        assert np.array_equal(array, layout.flatten(params)[path].astype(wanted))


@pytest.mark.parametrize("piece", [1, 3000, 1 << 30])
def test_tensors_are_read_in_pieces(tmp_path, monkeypatch, piece):
    params = written.params()
    folder = HuggingFaceFolder(written.hugging_face(tmp_path, params), VOCABULARY)
    monkeypatch.setattr(safetensors_files, "_PIECE", piece)
    for path, array in folder.params(np.float32):
        assert np.array_equal(array, layout.flatten(params)[path])


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_stored_head_that_is_the_embedding_and_buffers_are_no_harm(tmp_path):
    folder = written.hugging_face(tmp_path, written.params(), shards=1)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    edit(folder, lambda t: t.update(extra, **{"lm_head.weight": t["model.embed_tokens.weight"]}))
    params = dict(HuggingFaceFolder(folder, VOCABULARY).params(np.float32))
    assert set(params) == set(layout.flatten(written.params()))


def test_rows_beyond_the_tokenizer_are_dropped_up_to_a_point(tmp_path):
    folder = written.hugging_face_multimodal(tmp_path, written.params())
    assert HuggingFaceFolder(folder, VOCABULARY).config == tiny.CONFIG
    for wrong in (VOCABULARY - 200, VOCABULARY + 65):
        with pytest.raises(CheckpointError, match=r"the tokenizer has .* pieces, config.json says"):
            HuggingFaceFolder(folder, wrong)


def test_a_tensor_that_changes_while_it_is_read_is_noticed(tmp_path):
    folder = written.hugging_face(tmp_path, written.params(), shards=1)
    reader = HuggingFaceFolder(folder, VOCABULARY)
    edit(folder, lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)}))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' changed while it was read"):
        list(reader.params(np.float32))


def test_a_tokenizer_of_another_model_is_refused(tmp_path, cache):
    from gemma_nb.checkpoints import load as front_door

    folder = written.orbax_flat(tmp_path / "x", written.params())
    metadata = tiny.vocabulary()
    metadata["tokenizer.ggml.tokens"] += ["one", "more"]
    for column, value in (("scores", -99.0), ("token_type", 1)):
        key = f"tokenizer.ggml.{column}"
        metadata[key] = np.append(metadata[key], [value] * 2).astype(metadata[key].dtype)
    from gemma_nb.text.tokenizer import Tokenizer

    Tokenizer.from_gguf(metadata).save_model(folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match="the tokenizer has 278 pieces, the embedding 276"):
        front_door.load_params(folder, progress=False)


def test_config_json_may_be_of_any_gemma(tmp_path):
    """The rest of a folder is read as the configuration says."""
    folder = written.hugging_face(tmp_path, written.params())
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "sliding_window": 8}))
    config = HuggingFaceFolder(folder, VOCABULARY).config
    assert {layer.kind.window for layer in config.layers} == {8}


# --- heads ----------------------------------------------------------------------------------------


def untied(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": False} | fields)
    )
    return folder


@pytest.mark.parametrize("stored", [np.float32, np.float64])
def test_a_head_of_the_same_values_is_the_embedding_whatever_config_json_says(tmp_path, stored):
    folder = untied(written.hugging_face(tmp_path, written.params(), shards=1))
    edit(folder, lambda t: t.update({HEAD: t["model.embed_tokens.weight"].astype(stored)}))
    params = dict(HuggingFaceFolder(folder, VOCABULARY).params(np.float32))
    assert set(params) == set(layout.flatten(written.params()))


def test_a_head_of_its_own_is_refused_and_a_promised_one_asked_for(tmp_path):
    folder = untied(written.hugging_face(tmp_path, written.params(), shards=1))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is false.*'lm_head.weight' is"):
        HuggingFaceFolder(folder, VOCABULARY)
    edit(folder, lambda t: t.update({HEAD: t["model.embed_tokens.weight"] * np.float32(1.001)}))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from the embedding"):
        list(HuggingFaceFolder(folder, VOCABULARY).params(np.float32))


# --- weights that are missing ---------------------------------------------------------------------


def test_weights_of_another_program_are_named(tmp_path):
    folder = written.hugging_face(tmp_path, written.params(), shards=1)
    (folder / "model.safetensors").rename(folder / "flax_model.msgpack")
    with pytest.raises(CheckpointError, match=r"no \*.safetensors file, only flax_model.msgpack"):
        HuggingFaceFolder(folder)


def test_shards_that_an_index_names_are_counted(tmp_path):
    folder = written.hugging_face(tmp_path, written.params(), shards=3)
    for number in (1, 3):
        (folder / f"model-{number:05}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"-00001-of-.* is missing; 2 of the 3 files"):
        HuggingFaceFolder(folder)


def test_a_config_beside_a_gguf_file_is_no_folder_of_hugging_face(tmp_path, tiny_gguf):
    (tmp_path / "config.json").write_text("{}")
    assert safetensors.is_folder(tmp_path)
    (tmp_path / "model.gguf").write_bytes(tiny_gguf.read_bytes())
    assert sources.resolve(tmp_path).format == "GGUF"
