"""Configurations that make no sense cannot be written; those of others are read."""

import dataclasses
from types import SimpleNamespace

import pytest

from gemma_nb import presets
from gemma_nb.config import Global, Sliding, TransformerConfig, interleave
from gemma_nb.sites import SITES, check_layers, site


def test_gemma3_interleaves_five_sliding_layers_and_a_global_one():
    kinds = [spec.kind for spec in presets.GEMMA3_270M.layers]
    assert [i for i, kind in enumerate(kinds) if kind == Global()] == [5, 11, 17]
    assert kinds[0] == Sliding(512)
    assert presets.GEMMA3_270M.layers[5].rope_base == 1e6
    assert presets.GEMMA3_270M.layers[4].rope_base == 1e4


def test_only_the_larger_models_scale_global_rope():
    assert presets.GEMMA3_1B.layers[5].rope_scale == 1.0
    assert presets.GEMMA3_4B.layers[5].rope_scale == 8.0
    assert presets.GEMMA3_4B.layers[0].rope_scale == 1.0


def test_the_27b_scales_queries_by_width_per_head():
    assert presets.GEMMA3_27B.query_pre_attn_scalar == 5376 / 32
    assert presets.GEMMA3_12B.query_pre_attn_scalar == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"head_dim": 7}, "even"),
        ({"layers": ()}, "at least one"),
        ({"embed_dim": 0}, "embed_dim must be at least 1"),
    ],
)
def test_impossible_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(presets.GEMMA3_270M, **change)


def test_a_window_holds_at_least_one_position():
    with pytest.raises(ValueError, match="at least 1 position"):
        interleave(2, window=0)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="gemma3-270m, gemma3-1b"):
        presets.by_name("gemma3-2b")
    with pytest.raises(ValueError, match="attention"):
        site("attn_probs")
    assert site("attention") is SITES["attention"]


def test_layers_are_checked_and_sorted():
    assert check_layers(None, 3) == (0, 1, 2)
    assert check_layers(-1, 3) == (2,)
    assert check_layers([2, 0, 2], 3) == (0, 2)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        check_layers([3], 3)
    with pytest.raises(ValueError, match="empty"):
        check_layers([], 3)


# --- presets --------------------------------------------------------------------------------------

# Embedding and other parameters: Gemma report (arXiv:2403.08295), table 2; Gemma 2 report
# (arXiv:2408.00118), table 2.
PUBLISHED = {
    "gemma1-2b": (524_550_144, 1_981_884_416),
    "gemma1-7b": (786_825_216, 7_751_248_896),
    "gemma2-2b": (590_118_912, 2_024_517_888),
    "gemma2-9b": (917_962_752, 8_324_201_984),
    "gemma2-27b": (1_180_237_824, 26_047_480_320),
}
# In millions: Gemma 3 report (arXiv:2503.19786), table 1.
PUBLISHED_MILLIONS = {
    "gemma3-1b": (302, 698),
    "gemma3-4b": (675, 3209),
    "gemma3-12b": (1012, 10_759),
    "gemma3-27b": (1416, 25_600),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    config = presets.by_name(name)
    embedding = config.num_embed * config.embed_dim
    assert (embedding, config.num_params() - embedding) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_rounded_parameter_counts_are_the_published_ones(name):
    config = presets.by_name(name)
    embedding = config.num_embed * config.embed_dim
    # The report cuts off or rounds.
    assert PUBLISHED_MILLIONS[name] == pytest.approx(
        (embedding / 1e6, (config.num_params() - embedding) / 1e6), abs=7
    )


def test_every_release_is_a_size():
    assert {info.preset for info in presets.RELEASES.values()} == set(presets.PRESETS)
    for name, info in presets.RELEASES.items():
        assert info.name == name
        assert info.tokenizer_version == presets.tokenizer_version(presets.by_name(info.preset))
        assert info.hugging_face.startswith("google/")
        assert info.title[0].isupper()
        assert "https://" in info.terms
    assert len({info.hugging_face for info in presets.RELEASES.values()}) == len(presets.RELEASES)


def test_pretrained_and_tuned_releases_differ_in_how_they_talk():
    base, tuned = presets.RELEASES["gemma2-9b"], presets.RELEASES["gemma2-9b-it"]
    assert (base.tuning, base.template) == ("base", "transcript")
    assert (tuned.tuning, tuned.template) == ("instruction", "gemma")
    assert dict(base.sampling)["temperature"] < dict(tuned.sampling)["temperature"]
    assert presets.RELEASES["codegemma-2b"].template == "none"


def test_a_size_is_recognised_whatever_file_it_came_from():
    for name, config in presets.PRESETS.items():
        assert presets.name_of(config) == name
    changed = {"num_embed": 256_000, "max_context": 4096, "transpose_gating_einsum": True}
    assert presets.name_of(dataclasses.replace(presets.GEMMA2_2B, **changed)) == "gemma2-2b"
    uncapped = dataclasses.replace(presets.GEMMA2_2B, final_logit_soft_cap=None)
    assert presets.name_of(uncapped) is None
    assert presets.tokenizer_version(uncapped) is None
    other = dataclasses.replace(presets.GEMMA3_1B, num_embed=300_000)
    assert presets.name_of(other) is None


# --- Hugging Face ---------------------------------------------------------------------------------

GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256_000,
}
GEMMA2_27B = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36_864,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256_000,
}
GEMMA3_1B = {
    "cache_implementation": "hybrid",
    "head_dim": 256,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32_768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10_000,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262_144,
}
# The released file says no more than this: all else is the default of its class.
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}


@pytest.mark.parametrize(
    ("file", "name", "num_embed"),
    [
        (GEMMA_2B, "gemma1-2b", 256_000),
        (GEMMA2_27B, "gemma2-27b", 256_000),
        (GEMMA3_1B, "gemma3-1b", 262_144),
        (GEMMA3_4B, "gemma3-4b", 262_208),
    ],
)
def test_released_config_json_files_are_the_presets(file, name, num_embed):
    expected = dataclasses.replace(presets.by_name(name), num_embed=num_embed)
    assert TransformerConfig.from_hf(file) == expected


def test_config_json_as_transformers_5_writes_it():
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(26)]
    old = ("rope_local_base_freq", "rope_theta", "rope_scaling", "sliding_window_pattern")
    new = {name: value for name, value in GEMMA3_1B.items() if name not in old}
    new["layer_types"] = kinds
    new["rope_parameters"] = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    layers = interleave(26, window=512, global_scale=8.0)
    assert TransformerConfig.from_hf(new) == dataclasses.replace(presets.GEMMA3_1B, layers=layers)
    flat = GEMMA2_27B | {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
    assert {spec.rope_base for spec in TransformerConfig.from_hf(flat).layers} == {5000.0}


def test_null_soft_caps_are_none_and_absent_ones_are_as_usual():
    absent = {k: v for k, v in GEMMA2_27B.items() if not k.endswith("softcapping")}
    assert TransformerConfig.from_hf(absent).attn_logits_soft_cap == 50.0
    null = GEMMA2_27B | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = TransformerConfig.from_hf(null)
    assert config.attn_logits_soft_cap is config.final_logit_soft_cap is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3n_text"}, "'gemma3n_text' is not supported; expected 'gemma'"),
        ({"model_type": ["gemma"]}, "is not supported"),
        ({"model_type": "gemma3"}, "no 'text_config'"),
        ({"hidden_size": None}, "'hidden_size' of a 'gemma3_text' model: is missing"),
        ({"hidden_size": 10**400}, "expected a whole number from 1"),
        ({"num_hidden_layers": 100_000}, "from 1 to 256"),
        ({"num_hidden_layers": True}, "expected a number, got True"),
        ({"rope_theta": float("nan")}, "expected a number, got nan"),
        ({"rope_theta": 0}, "expected a positive number"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "expected 'default' or 'linear', got 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor' .* is missing"),
        ({"rope_scaling": 8}, "expected an object, got 8"),
        ({"layer_types": ["full_attention"]}, "expected 26 of"),
        ({"layer_types": [{}] * 26}, "expected 26 of"),
        ({"attention_bias": True}, "expected False, got True"),
        ({"use_bidirectional_attention": True}, "expected False, got True"),
        ({"tie_word_embeddings": False}, "expected True, got False"),
        ({"quantization_config": {"bits": 4}}, "expected None"),
        ({"hidden_activation": "relu"}, "expected 'gelu_pytorch_tanh', got 'relu'"),
        ({"rms_norm_eps": 1e-5}, "expected 1e-06"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
    ],
)
def test_config_json_that_cannot_be_right_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_hf(GEMMA3_1B | change)
    with pytest.raises(ValueError, match="expected the content of a"):
        TransformerConfig.from_hf([])


# --- google-deepmind/gemma ------------------------------------------------------------------------


def gm_config(**changes):
    """Gemma 3 4B in gm's words; `tests/contract` reads gm's own."""
    kinds = {kind: SimpleNamespace(name=kind) for kind in ("LOCAL_SLIDING", "GLOBAL")}
    numbers = {
        "num_embed": 262_144,
        "embed_dim": 2560,
        "hidden_dim": 10_240,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 256,
        "attention_types": [kinds["GLOBAL" if i % 6 == 5 else "LOCAL_SLIDING"] for i in range(34)],
        "query_pre_attn_norm": SimpleNamespace(name="BY_ONE_OVER_SQRT_HEAD_DIM"),
        "attn_logits_soft_cap": None,
        "final_logit_softcap": None,
        "sliding_window_size": 1024,
        "transpose_gating_einsum": True,
        "use_qk_norm": True,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "local_base_frequency": 10_000,
        "global_base_frequency": 1_000_000,
        "local_scale_factor": 1.0,
        "global_scale_factor": 8.0,
    }
    return SimpleNamespace(**{**numbers, **changes})


def test_gm_configurations_are_read():
    assert TransformerConfig.from_gm(gm_config()) == presets.GEMMA3_4B
    for rule, scale in (
        ("BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS", 320**-0.5),
        ("BY_EMBED_DIM_DIV_NUM_HEADS", 320.0),
    ):
        config = gm_config(query_pre_attn_norm=SimpleNamespace(name=rule))
        assert TransformerConfig.from_gm(config).query_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_altup": True}, "it has use_altup"),
        ({"query_pre_attn_norm": SimpleNamespace(name="BY_MAGIC")}, "BY_MAGIC"),
        ({"attention_types": [SimpleNamespace(name="CHUNKED")]}, "got CHUNKED"),
    ],
)
def test_other_gm_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_gm(gm_config(**change))
    with pytest.raises(ValueError, match="it has no attention_types"):
        TransformerConfig.from_gm(SimpleNamespace(num_embed=1))
