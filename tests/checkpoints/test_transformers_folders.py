"""Folders that transformers itself writes, against its own copy of the weights."""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest

from gemma_nb.checkpoints import layout
from gemma_nb.checkpoints import load as front_door
from tests import test_rope_spellings as spellings
from tests.checkpoints import tiny, written

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("cache", "no_compilation_cache")]

SIZES = {
    "vocab_size": tiny.CONFIG.num_embed,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def make(family: str):
    import transformers

    if family == "Gemma3ForConditionalGeneration":
        config = transformers.Gemma3Config(
            text_config={**SIZES, "model_type": "gemma3_text"}, vision_config=VISION
        )
    else:
        names = {"Gemma3ForCausalLM": "Gemma3TextConfig"}
        name = names.get(family, family.replace("ForCausalLM", "Config"))
        config = getattr(transformers, name)(**SIZES)
    return getattr(transformers, family)(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family",
    [
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
    ],
)
def test_what_save_pretrained_writes_is_read(family, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    written.tokenizer(tmp_path)
    config, params, *_ = front_door.load_params(tmp_path, dtype="float32", progress=False)
    inner = model.model.language_model if "Conditional" in family else model.model
    tensors = {f"model.{name}": value.numpy() for name, value in inner.state_dict().items()}
    flat = layout.flatten(jax.tree.map(np.asarray, params))
    for leaf in layout.leaves(config):
        expected = leaf.join([tensors.pop(name) for name in leaf.hf])
        assert np.array_equal(flat[leaf.path], expected)
    assert not tensors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spelling", sorted(spellings.GEMMA3.keys() - spellings.NOT_COMPUTED))
def test_every_spelling_of_rope_rotates_as_there(spelling):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    fields, *rotations = spellings.GEMMA3[spelling]
    rotary = Gemma3RotaryEmbedding(Gemma3TextConfig(**spellings.SIZES, **copy.deepcopy(fields)))
    for layers, rotation in zip(("full_attention", "sliding_attention"), rotations, strict=True):
        if rotation is not None:
            base, scale = rotation
            expected = base ** -(np.arange(8) / 8) / scale
            actual = getattr(rotary, f"{layers}_inv_freq").numpy()
            np.testing.assert_allclose(actual, expected, rtol=1e-6)
