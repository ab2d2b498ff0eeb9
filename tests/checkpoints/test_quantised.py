"""Weights that another library has packed are named after it.

Names, dtypes and shapes as bitsandbytes 0.49, AutoGPTQ, AutoAWQ, compressed-tensors, torchao, MLX,
ExLlamaV2 and 3, HQQ and quanto save them.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gemma_nb.checkpoints import quantised
from gemma_nb.checkpoints.safetensors import HuggingFaceFolder
from gemma_nb.errors import CheckpointError
from tests.checkpoints import written

LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, None),
        ({"quantization_config": None, "quantization": {}}, None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, " (by gptq, in 4 bits)"),
        ({"quantization_config": {"quant_method": "awq"}}, " (by awq)"),
        ({"quantization_config": {"load_in_4bit": True}}, " (by bitsandbytes, in 4 bits)"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            " (by bitsandbytes, in 8 bits)",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, " (by MLX, in 4 bits)"),
        ({"text_config": {"quantization_config": {"quant_method": "torchao"}}}, " (by torchao)"),
        ({"quantization_config": {"bits": 3}}, " (in 3 bits)"),
        ({"quantization_config": "yes"}, ""),
    ],
)
def test_config_json_says_by_what(config, said):
    assert quantised.by_config(config) == said


@pytest.mark.parametrize(
    ("library", "tensors"),
    [
        ("bitsandbytes", {"weight": ("U8", (1024, 1)), "weight.absmax": ("U8", (32,))}),
        ("bitsandbytes", {"weight": ("I8", (32, 64)), "SCB": ("F32", (32,))}),
        (
            "GPTQ",
            {"qweight": ("I32", (8, 32)), "scales": ("F16", (1, 32)), "g_idx": ("I32", (64,))},
        ),
        ("GPTQ", {"qweight": ("I32", (8, 32)), "scales": ("F16", (1, 32))}),
        ("AWQ", {"qweight": ("I32", (64, 4)), "scales": ("F16", (1, 32))}),
        ("GPTQ or AWQ", {"qzeros": ("I32", (64, 4))}),
        ("compressed-tensors", {"weight_packed": ("I32", (32, 8)), "weight_scale": ("F16", (1,))}),
        ("compressed-tensors", {"weight": ("I8", (32, 64)), "weight_scale": ("BF16", (32, 1))}),
        (
            "a float8 library",
            {"weight": ("F8_E4M3", (32, 64)), "weight_scale_inv": ("F32", (1, 1))},
        ),
        ("torchao", {"_weight_qdata": ("I8", (32, 64)), "_weight_scale": ("F32", (32, 1))}),
        (
            "MLX",
            {"weight": ("U32", (32, 8)), "scales": ("F16", (32, 1)), "biases": ("F16", (32, 1))},
        ),
        ("ExLlamaV2", {"q_weight": ("I32", (4, 32)), "q_invperm": ("I16", (64,))}),
        ("ExLlamaV3", {"trellis": ("I16", (2, 4, 64)), "suh": ("F16", (64,))}),
        ("HQQ", {"W_q": ("U8", (16, 64)), "meta": ("F16", (1,))}),
        ("quanto", {"weight._data": ("I8", (32, 64)), "weight._scale": ("F16", (32, 1))}),
    ],
)
def test_what_a_library_leaves_beside_a_layer_names_it(library, tensors):
    stored = {
        f"{LAYER}.{name}": SimpleNamespace(dtype=dtype, shape=shape)
        for name, (dtype, shape) in tensors.items()
    }
    found = quantised.by_tensors(stored)
    assert found is not None
    assert found[0] == library
    assert found[1] in stored


def test_plain_weights_show_no_library():
    stored = {
        f"{LAYER}.weight": SimpleNamespace(dtype="BF16", shape=(32, 64)),
        "vision_tower.encoder.layers.0.mlp.fc1.bias": SimpleNamespace(dtype="BF16", shape=(4,)),
    }
    assert quantised.by_tensors(stored) is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"absmax": np.ones(32, np.uint8)}, r"absmax': quantised weights, .* \(by bitsandbytes\)"),
        ({}, r"down_proj.weight': expected one of BF16, F16, F32, F64, got U8; .* not quantised"),
    ],
)
def test_packed_bytes_are_refused_with_and_without_a_trace(tmp_path, extra, message):
    packed = {f"{LAYER}.weight": np.ones((1024, 1), np.uint8)}
    packed |= {f"{LAYER}.weight.{name}": value for name, value in extra.items()}
    folder = written.hugging_face(tmp_path, written.params(), shards=1, extra=packed)
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceFolder(folder)
