"""Fine-tunes with tokens behind the vocabulary: their rows and their names are both there."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemma_nb.checkpoints import load as front_door
from gemma_nb.checkpoints.orbax import save_params
from tests.checkpoints import tiny, written
from tests.text.hugging_face import SIZE, added, decoder, tokenizer_json

pytestmark = pytest.mark.usefixtures("cache", "no_compilation_cache")

SPECIAL, PLAIN = added("<|im_start|>", SIZE, special=True), added("<think>", SIZE + 1)


def resized(folder, rows, *, said=None):
    """A Hugging Face folder whose embedding has `rows` more rows; config.json says `said` more."""
    tree = written.params()
    embedding = tree["embedder"]["input_embedding"]
    more = np.random.default_rng(1).normal(size=(rows, embedding.shape[1])).astype(np.float32)
    table = np.concatenate([embedding, more])
    config = {**written.HF_CONFIG, "vocab_size": SIZE + (rows if said is None else said)}
    extra = {"model.embed_tokens.weight": table}
    return written.hugging_face(folder, tree, shards=1, extra=extra, config=config), table


def load(folder):
    config, params, _, tokenizer = front_door.load_params(folder, dtype="float32", progress=False)
    return config, np.asarray(params["embedder"]["input_embedding"]), tokenizer


def put(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("padding", [0, -(SIZE + 2) % 64])
@pytest.mark.parametrize("said", [None, 0])
def test_rows_of_added_tokens_are_kept(tmp_path, padding, said):
    folder, table = resized(tmp_path, 2 + padding, said=said)
    put(folder, tokenizer_config=decoder(SPECIAL, PLAIN))
    config, embedding, tokenizer = load(folder)
    assert config.num_embed == tokenizer.vocab_size == SIZE + 2
    np.testing.assert_array_equal(embedding, table[: SIZE + 2])
    assert tokenizer.control["<|im_start|>"] == SIZE
    assert tokenizer.encode("<think>") == [SIZE + 1]


def test_a_folder_with_tokenizer_json_alone_is_read(tmp_path):
    folder, table = resized(tmp_path, 2)
    (folder / "tokenizer.model").unlink()
    put(folder, tokenizer=tokenizer_json(more=[SPECIAL, PLAIN]))
    _, embedding, tokenizer = load(folder)
    np.testing.assert_array_equal(embedding, table)
    assert tokenizer.encode("the<think>")[-1] == SIZE + 1


def test_rows_that_nothing_names_are_kept_and_said(tmp_path):
    folder, table = resized(tmp_path, 3)
    assert (SIZE + 3) % 8
    with pytest.warns(UserWarning, match=rf"{SIZE + 3} rows, the tokenizer {SIZE} pieces"):
        config, embedding, tokenizer = load(folder)
    assert (config.num_embed, tokenizer.vocab_size) == (SIZE + 3, SIZE)
    np.testing.assert_array_equal(embedding, table)


def test_an_official_folder_with_tokenizer_json_beside_it_is_read(tmp_path):
    folder = save_params(written.params(), tiny.CONFIG, tmp_path / "tiny")
    put(tmp_path, tokenizer=tokenizer_json())
    _, _, tokenizer = load(folder)
    assert tokenizer.decode(tokenizer.encode("the é")) == "the é"
