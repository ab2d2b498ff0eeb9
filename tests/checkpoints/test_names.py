"""Names that saving with or around another program leaves: the model inside is the same."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from gemma_nb.checkpoints import layout, names
from gemma_nb.checkpoints.safetensors import HuggingFaceFolder
from gemma_nb.errors import CheckpointError
from tests.checkpoints import tiny, written

PLAIN = [name for leaf in layout.leaves(tiny.CONFIG) for name in leaf.hf]


def bare(name: str) -> str:
    """As the model without its head saves it (`Gemma3TextModel`)."""
    return name.removeprefix("model.")


WRAPPERS: dict[str, Callable[[str], str]] = {
    "no head": bare,
    "transformer": lambda name: f"transformer.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DistributedDataParallel": lambda name: f"module.{name}",
    "DistributedDataParallel of a compiled model without a head": lambda name: (
        f"module._orig_mod.{bare(name)}"
    ),
    "PEFT": lambda name: f"base_model.model.{name}",
    "FSDP of each layer": lambda name: (
        "_fsdp_wrapped_module."
        + re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name)
    ),
    "torch.compile of a projection": lambda name: name.replace("q_proj.", "q_proj._orig_mod."),
    "multimodal, old": lambda name: f"language_model.{name}",
    "multimodal, new": lambda name: f"model.language_model.{bare(name)}",
    "multimodal, trained": lambda name: f"module.model.language_model.{bare(name)}",
    "nobody's": lambda name: f"policy.net.{name}",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_parameter_is_known_by_the_end_of_its_name(wrapper):
    rename = WRAPPERS[wrapper]
    found = dict(names.text_names([rename(name) for name in PLAIN], tiny.CONFIG))
    assert found == {rename(name): name for name in PLAIN}


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "base_model.model."])
def test_heads_are_found_anywhere_and_images_left_out(prefix):
    images = [
        f"{prefix}vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        f"{prefix}multi_modal_projector.mm_soft_emb_norm.weight",
    ]
    head = f"{prefix}lm_head.weight"
    assert dict(names.text_names([head, *images], tiny.CONFIG)) == {head: "lm_head.weight"}


def test_what_is_no_parameter_keeps_its_name():
    strange = ["model.layers.2.mlp.up_proj.weight", "x.q_proj.lora_A.weight", "up_proj.weight"]
    assert dict(names.text_names(strange, tiny.CONFIG)) == {name: name for name in strange}


def test_a_wrapped_folder_is_the_folder(tmp_path):
    tree = written.params()
    head = {"lm_head.weight": tree["embedder"]["input_embedding"]}
    rename = WRAPPERS["FSDP of each layer"]
    folder = written.hugging_face(tmp_path, tree, rename=rename, extra=head)
    for path, array in HuggingFaceFolder(folder, tiny.CONFIG.num_embed).params(np.float32):
        assert np.array_equal(array, layout.flatten(tree)[path])


def test_two_models_in_one_folder_are_refused(tmp_path):
    extra = {"ema.model.norm.weight": np.ones(32, np.float32)}
    folder = written.hugging_face(tmp_path, written.params(), shards=1, extra=extra)
    with pytest.raises(CheckpointError, match=r"'ema.model.norm.weight'.*are the same parameter"):
        HuggingFaceFolder(folder)


def test_an_adapter_beside_its_base_is_said_for_what_it_is(tmp_path):
    folder = written.hugging_face(
        tmp_path,
        written.params(),
        rename=lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"),
    )
    with pytest.raises(CheckpointError, match=r"q_proj.base_layer.weight' belongs to no .* merged"):
        HuggingFaceFolder(folder)
