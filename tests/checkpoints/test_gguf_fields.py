"""GGUF files that leave fields out, and those of other programs than llama.cpp.

What is filled in is what llama.cpp's loader takes (`llama_model_base::load_hparams` and the
`load_arch_hparams` of its three Gemmas, 2026), and what Ollama's engine takes in files of its own
(`model/models/gemma3/model_text.go` and `llama/compat`), with two exceptions that are said below.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from gemma_nb.checkpoints import gguf_fields, layout
from gemma_nb.checkpoints import load as front_door
from gemma_nb.checkpoints.gguf import GGUFFile, config_from_gguf, official_params
from gemma_nb.checkpoints.gguf_header import TensorInfo
from gemma_nb.config import Global, LayerSpec, Sliding
from gemma_nb.errors import CheckpointError
from gemma_nb.text.tokenizer import Tokenizer
from tests.checkpoints import tiny

TENSORS = {
    name: TensorInfo(name, array.shape, "F32", 0, array.nbytes)
    for name, array in tiny.tensors().items()
}
SIZES = [
    *("embedding_length", "block_count", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base"),
]


def without(*keys: str, **more: Any) -> dict[str, Any]:
    fields = {k: v for k, v in tiny.metadata().items() if not k.endswith(keys)}
    return gguf_fields.complete(fields | more, TENSORS)


@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_not_said_is_that_of_the_tensors(key):
    assert config_from_gguf(without(key)) == tiny.CONFIG


def test_heads_alone_tell_all_sizes():
    """llama.cpp takes D / N for the width of a head, which is right for no Gemma but the 7B."""
    kept = {"gemma3.attention.head_count": 2, "gemma3.attention.sliding_window": 16}
    metadata = {"general.architecture": "gemma3", **kept, **tiny.vocabulary()}
    config = config_from_gguf(gguf_fields.complete(metadata, TENSORS))
    assert (config.head_dim, config.num_kv_heads, config.hidden_dim) == (32, 1, 64)
    assert config.layers == tiny.CONFIG.layers
    assert config.max_context == 32_768
    sizes = {key: tiny.FIELDS[key] for key in tiny.FIELDS if key.endswith(("_length", "_count"))}
    sizes = {key: value for key, value in sizes.items() if "attention" not in key}
    assert config_from_gguf(metadata | sizes).head_dim == 16


def rope(architecture: str = "gemma3", **fields: Any) -> set[LayerSpec]:
    metadata = {k.replace("gemma3", architecture): v for k, v in tiny.metadata().items()}
    metadata["general.architecture"] = architecture
    metadata["gemma3.rope.freq_base"] = 1e6
    metadata[f"{architecture}.attention.sliding_window_pattern"] = 2
    added = {f"{architecture}.{key.replace('__', '.')}": value for key, value in fields.items()}
    return set(config_from_gguf(gguf_fields.complete(metadata | added)).layers)


GLOBAL, LOCAL = LayerSpec(Global(), 1e6), LayerSpec(Sliding(16), 1e4)
SCALED = LayerSpec(Global(), 1e6, 8.0)


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"rope__scaling__factor": 8.0}, {SCALED, LOCAL}),
        ({"rope__scale_linear": 8.0}, {SCALED, LOCAL}),
        ({"rope__scaling__factor": 8.0, "rope__scale_linear": 4.0}, {SCALED, LOCAL}),
        ({"rope__scaling__type": "linear"}, {GLOBAL, LOCAL}),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 0.0}, {GLOBAL, LOCAL}),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 8.0}, {GLOBAL, LOCAL}),
        ({"rope__freq_base_swa": 5e3}, {GLOBAL, LayerSpec(Sliding(16), 5e3)}),
        ({"attention__sliding_window": 0}, {GLOBAL}),
        ({"attention__sliding_window_pattern": np.array([True, True])}, {LOCAL}),
        ({"rope__dimension_count": 32, "attention__head_count": np.array([2, 2])}, {GLOBAL, LOCAL}),
    ],
)
def test_positions_are_read_as_llama_cpp_reads_them(fields, layers):
    assert rope(**fields) == layers


def test_gemma2_scales_all_its_layers_and_gemma_has_no_window():
    scaled = {LayerSpec(Global(), 1e6, 8.0), LayerSpec(Sliding(16), 1e6, 8.0)}
    assert rope("gemma2", rope__scaling__factor=8.0) == scaled
    own = {LayerSpec(Global(), 1e6), LayerSpec(Sliding(16), 5e3)}
    assert rope("gemma2", rope__freq_base_swa=5e3) == own
    assert rope("gemma", rope__scale_linear=8.0) == {SCALED}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope__scaling__type": "yarn"}, "expected 'linear', got 'yarn'; use a file"),
        ({"rope__dimension_count": 8}, "'gemma3.rope.dimension_count': expected 32, got 8"),
        ({"attention__key_length_swa": 8}, "key_length_swa': expected 32, got 8"),
        ({"attention__head_count": np.array([2, 4])}, "head_count': expected a number, got"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(fields, message):
    with pytest.raises(CheckpointError, match=message):
        rope(**fields)


# --- vocabularies ---------------------------------------------------------------------------------

TEXT = "the th\n\nhe the <b> 日本"


@pytest.mark.parametrize(
    "keys",
    [
        ("unknown_token_id",),
        ("padding_token_id",),
        ("_token_id",),
        ("ggml.scores",),
        ("ggml.token_type", "ggml.model"),
        ("_token_id", "ggml.scores", "ggml.token_type"),
    ],
)
def test_vocabularies_are_completed_by_name_and_order(keys):
    """llama.cpp takes LLaMA's ids and scores of 0, with which Gemma's text is cut otherwise."""
    whole, completed = Tokenizer.from_gguf(tiny.vocabulary()), Tokenizer.from_gguf(without(*keys))
    assert completed.encode(TEXT) == whole.encode(TEXT)
    for name in ("bos_id", "eos_id", "pad_id", "unk_id"):
        assert getattr(completed, name) == getattr(whole, name)
    assert completed.control.keys() >= whole.control.keys() - {"<unused0>"}


def test_ids_that_stand_for_none_are_found_by_name_and_others_are_kept():
    none = {"tokenizer.ggml.padding_token_id": (1 << 32) - 1, "tokenizer.ggml.eos_token_id": -1}
    completed = without(**none, **{"tokenizer.ggml.unknown_token_id": 6})
    ids = [completed[f"tokenizer.ggml.{key}_token_id"] for key in ("padding", "eos", "unknown")]
    assert ids == [0, 1, 6]
    odd = np.zeros(3)
    kept = without(**{"tokenizer.ggml.bos_token_id": odd, "gemma3.vision.block_count": odd})
    assert kept["tokenizer.ggml.bos_token_id"] is odd


def test_types_by_name_are_those_of_the_released_vocabulary():
    from gemma_nb.checkpoints import gguf_split, sources
    from gemma_nb.errors import ModelNotInstalledError

    try:
        source = sources.resolve("gemma3-270m")
    except ModelNotInstalledError:
        pytest.skip("the default model is not installed")
    with gguf_split.open_files(source.files, source.name) as file:
        metadata = dict(file.metadata)
    expected = metadata.pop("tokenizer.ggml.token_type")
    completed = gguf_fields.complete(metadata)
    assert np.array_equal(completed["tokenizer.ggml.token_type"], expected)


def test_the_end_of_a_turn_is_no_end_of_a_text():
    """As some quantisers write it; both end a reply."""
    metadata = without(**{"tokenizer.ggml.eos_token_id": tiny.PIECES.index("<end_of_turn>")})
    assert Tokenizer.from_gguf(metadata).eos_id == tiny.PIECES.index("<eos>")


# --- other programs -------------------------------------------------------------------------------


def ollama(**numbers: Any) -> dict[str, Any]:
    """What Ollama wrote for Gemma 3 in 2025: no epsilon, no scale, names of its own."""
    fields = {k: v for k, v in tiny.FIELDS.items() if "rope" not in k and "epsilon" not in k}
    own = {"gemma3.mm.tokens_per_image": 256, "gemma3.vision.block_count": 27}
    return {"general.architecture": "gemma3"} | fields | own | numbers


@pytest.mark.parametrize("layers", [34, 48, 62])
def test_large_models_of_ollama_are_scaled(layers):
    metadata = ollama(**{"gemma3.block_count": layers}) | tiny.vocabulary()
    config = config_from_gguf(gguf_fields.complete(metadata))
    assert {spec.rotation for spec in config.layers} == {(1e6, 8.0), (1e4, 1.0)}
    factor = {"gemma3.rope.scaling.factor": 2.0}
    config = config_from_gguf(gguf_fields.complete(metadata | factor))
    assert {spec.rotation for spec in config.layers} == {(1e6, 2.0), (1e4, 1.0)}


def test_the_small_model_of_ollama_is_not_capped():
    own = {"gemma3.block_count": 26, "gemma3.final_logit_softcapping": 30.0}
    bases = {"gemma3.rope.global.freq_base": 2e6, "gemma3.rope.local.freq_base": 2e4}
    metadata = ollama(**own, **bases) | tiny.vocabulary()
    config = config_from_gguf(gguf_fields.complete(metadata))
    assert config.final_logit_soft_cap is None
    assert {spec.rotation for spec in config.layers} == {(2e6, 1.0), (2e4, 1.0)}
    capped = {k: v for k, v in metadata.items() if k in tiny.metadata() or k in own}
    config = config_from_gguf(gguf_fields.complete(capped))
    assert config.final_logit_soft_cap == 30.0


def write(path, metadata, tensors):
    """A file with these fields and no others."""
    writer = gguf.GGUFWriter(path, "gemma3")
    for key, value in metadata.items():
        if isinstance(value, str) and key != "general.architecture":
            writer.add_string(key, value)
        elif isinstance(value, list | np.ndarray):
            writer.add_array(key, list(value) if isinstance(value, list) else value.tolist())
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.usefixtures("cache", "no_compilation_cache")
def test_a_file_of_ollama_is_the_model_at_the_first_load_and_after(tmp_path):
    """With images, more tokens than rows, and a pattern layer by layer."""
    vocabulary = tiny.vocabulary()
    vocabulary["tokenizer.ggml.tokens"] = [*tiny.PIECES, "<image_soft_token>"]
    for column in ("scores", "token_type"):
        key = f"tokenizer.ggml.{column}"
        vocabulary[key] = np.append(vocabulary[key], 3).astype(vocabulary[key].dtype)
    pattern = {"gemma3.attention.sliding_window_pattern": [False, True]}
    image = {"v.blk.0.attn_k.weight": np.ones((4, 4), np.float32)}
    path = write(tmp_path / "x.gguf", ollama(**pattern) | vocabulary, tiny.tensors() | image)
    for _ in range(2):
        config, params, _, tokenizer = front_door.load_params(path, progress=False)
        assert [spec.kind for spec in config.layers] == [Global(), Sliding(16)]
        assert tokenizer.vocab_size == config.num_embed == len(tiny.PIECES)
        assert params["embedder"]["input_embedding"].shape == (len(tiny.PIECES), 32)


def test_who_wrote_a_file_is_said_where_it_cannot_be_read(tmp_path):
    says = {"general.name": "My tune", "general.quantized_by": "somebody"}
    tensors = {name.replace("blk.", "layers."): array for name, array in tiny.tensors().items()}
    file = GGUFFile(write(tmp_path / "x.gguf", says | tiny.metadata(), tensors))
    message = r"'blk.0.attn_q.weight' is missing, 'layers.0.*name 'My tune', quantized by 'some"
    with pytest.raises(CheckpointError, match=message):
        list(official_params(file, tiny.CONFIG))
    with pytest.raises(CheckpointError, match=r"got 'clip' \(the part of a model for images\)"):
        config_from_gguf({"general.architecture": "clip"})
    with pytest.raises(CheckpointError, match="written by Ollama"):
        config_from_gguf({"general.architecture": "x", "tokenizer.ggml.add_unknown_token": False})


# --- heads and padding ----------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [False, True])
def test_a_head_that_is_the_embedding_is_read(tmp_path, quantize):
    arrays = tiny.tensors()
    arrays["output.weight"] = arrays["token_embd.weight"].copy()
    path = tiny.write(tmp_path / "x.gguf", arrays=arrays, quantize=quantize)
    with GGUFFile(path) as file:
        assert len(dict(official_params(file, tiny.CONFIG))) == len(
            list(layout.leaves(tiny.CONFIG))
        )


def test_a_head_of_its_own_is_refused_with_how_it_is_stored(tmp_path):
    arrays = tiny.tensors()
    arrays["output.weight"] = (arrays["token_embd.weight"] * 1.01).astype(np.float16)
    file = GGUFFile(tiny.write(tmp_path / "x.gguf", arrays=arrays))
    with pytest.raises(CheckpointError, match=r"a head of its own \(stored as F16, .* as F32\)"):
        next(official_params(file, tiny.CONFIG))


def test_rows_that_pad_the_embedding_are_dropped(tmp_path):
    arrays = tiny.tensors()
    padding = np.ones((12, tiny.CONFIG.embed_dim), np.float32)
    expected = arrays["token_embd.weight"]
    arrays["token_embd.weight"] = np.concatenate([expected, padding])
    file = GGUFFile(tiny.write(tmp_path / "x.gguf", arrays=arrays))
    assert np.array_equal(next(official_params(file, tiny.CONFIG))[1], expected)


def test_queries_keys_and_values_in_one_tensor_are_told_apart(tmp_path):
    """As llama.cpp's `create_tensor_qkv` reads them: one above the other."""
    separate = tiny.tensors()
    arrays = dict(separate)
    parts = [arrays.pop(f"blk.1.attn_{part}.weight") for part in "qkv"]
    arrays["blk.1.attn_qkv.weight"] = np.concatenate(parts)
    whole = GGUFFile(tiny.write(tmp_path / "whole.gguf", arrays=separate))
    fused = GGUFFile(tiny.write(tmp_path / "fused.gguf", arrays=arrays))
    read = dict(official_params(fused, tiny.CONFIG))
    for path, array in official_params(whole, tiny.CONFIG):
        assert np.array_equal(read[path], array)
    arrays["blk.1.attn_qkv.weight"] = np.ones((3, 32), np.float32)
    short = GGUFFile(tiny.write(tmp_path / "short.gguf", arrays=arrays))
    with pytest.raises(CheckpointError, match=r"attn_qkv.weight': expected shape \(128, 32\)"):
        list(official_params(short, tiny.CONFIG))
