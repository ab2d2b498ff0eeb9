from __future__ import annotations

import contextlib
import re
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_nb import presets
from gemma_nb.checkpoints import catalog, gguf_header, layout
from gemma_nb.checkpoints import gguf as reader
from gemma_nb.checkpoints.gguf import GGUFFile, config_from_gguf, official_params
from gemma_nb.config import Global, Sliding
from gemma_nb.errors import CheckpointError
from tests.checkpoints import tiny


def write_fields(path, add):
    writer = gguf.GGUFWriter(path, "gemma3")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_of_every_type_come_back(tmp_path):
    def add(writer):
        for kind, value in [
            *(("uint8", 255), ("int8", -128), ("uint16", 65_535), ("int16", -5)),
            *(("uint32", 1 << 31), ("int32", -1), ("uint64", 1 << 40), ("int64", -(1 << 40))),
            *(("float32", 0.5), ("float64", 1e300), ("bool", True), ("string", "Grüße 👋")),
        ]:
            getattr(writer, f"add_{kind}")(kind, value)
        writer.add_array("texts", ["", "a\n", "日本"])
        writer.add_array("numbers", [1, -2, 3])

    metadata = GGUFFile(write_fields(tmp_path / "x.gguf", add)).metadata
    numbers = metadata.pop("numbers")
    assert numbers.tolist() == [1, -2, 3]
    assert metadata == {
        **{"general.architecture": "gemma3", "uint8": 255, "int8": -128, "uint16": 65_535},
        **{"int16": -5, "uint32": 1 << 31, "int32": -1, "uint64": 1 << 40, "int64": -(1 << 40)},
        **{"float32": 0.5, "float64": 1e300, "bool": True, "string": "Grüße 👋"},
        "texts": ["", "a\n", "日本"],
    }


@pytest.mark.parametrize("window", [1, 64, 1000])
def test_strings_that_straddle_the_window_are_whole(tiny_gguf, monkeypatch, window):
    monkeypatch.setattr(gguf_header, "_WINDOW", window)
    assert GGUFFile(tiny_gguf).metadata["tokenizer.ggml.tokens"] == tiny.PIECES


def test_tensors_are_read_row_major(tiny_gguf):
    file = GGUFFile(tiny_gguf)
    for name, array in tiny.tensors().items():
        assert file.tensors[name].shape == array.shape
        assert np.array_equal(file.read(name), array)


def test_float16_and_bfloat16_tensors(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float16)
    path = write_fields(tmp_path / "x.gguf", lambda w: w.add_tensor("x", array))
    assert np.array_equal(GGUFFile(path).read("x"), array.astype(np.float32))


@pytest.mark.parametrize("rows", [1, 3, 10_000])
def test_q8_0_is_scale_times_integer(tiny_q8_gguf, monkeypatch, rows):
    """Blocks of 32 values: a float16 scale, then 32 int8."""
    monkeypatch.setattr(reader, "_ROWS_AT_ONCE", rows)
    file = GGUFFile(tiny_q8_gguf)
    info = file.tensors["blk.1.ffn_down.weight"]
    raw = tiny_q8_gguf.read_bytes()[info.offset : info.offset + info.nbytes]
    blocks = np.frombuffer(raw, [("scale", "<f2"), ("values", "i1", 32)])
    expected = blocks["scale"].astype(np.float32)[:, None] * blocks["values"]
    assert info.type_name == "Q8_0"
    assert np.array_equal(file.read(info.name), expected.reshape(info.shape))


def test_bfloat16_is_rounded_once_to_nearest_even(tiny_q8_gguf):
    file = GGUFFile(tiny_q8_gguf)
    exact = file.read("token_embd.weight")
    bits = exact.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    actual = file.read("token_embd.weight", ml_dtypes.bfloat16)
    assert np.array_equal(actual.view(np.uint16), rounded)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_in_parts_is_the_file(tiny_gguf, tmp_path, data):
    raw = tiny_gguf.read_bytes()
    cuts = data.draw(st.lists(st.integers(1, len(raw) - 1), max_size=3, unique=True).map(sorted))
    parts = []
    for i, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(raw)], strict=True)):
        parts.append(tmp_path / f"part{i}")
        parts[-1].write_bytes(raw[start:stop])
    whole, pieces = GGUFFile(tiny_gguf), GGUFFile(parts)
    assert pieces.tensors == whole.tensors
    assert list(pieces.metadata) == list(whole.metadata)
    for name in whole.tensors:
        assert np.array_equal(pieces.read(name), whole.read(name))


# --- the model ------------------------------------------------------------------------------------


def test_config_says_what_the_file_says(tiny_gguf):
    assert config_from_gguf(GGUFFile(tiny_gguf).metadata) == tiny.CONFIG


def test_optional_fields_reach_the_config():
    metadata = tiny.metadata() | {
        "gemma3.block_count": 3,
        "gemma3.attention.sliding_window_pattern": np.array([True, False, True]),
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
        "gemma3.rope.freq_base_swa": 5000.0,
        "gemma3.final_logit_softcapping": 30.0,
        "gemma3.attn_logit_softcapping": 50.0,
    }
    config = config_from_gguf(metadata)
    assert [layer.kind for layer in config.layers] == [Sliding(16), Global(), Sliding(16)]
    assert [layer.rope_scale for layer in config.layers] == [1.0, 8.0, 1.0]
    assert [layer.rope_base for layer in config.layers] == [5000.0, 1e6, 5000.0]
    assert (config.final_logit_soft_cap, config.attn_logits_soft_cap) == (30.0, 50.0)


def test_the_27b_scales_queries_by_embed_dim_over_heads():
    metadata = tiny.metadata() | {
        "gemma3.context_length": 131_072,
        "gemma3.embedding_length": 5376,
        "gemma3.block_count": 62,
        "gemma3.feed_forward_length": 21_504,
        "gemma3.attention.head_count": 32,
        "gemma3.attention.head_count_kv": 16,
        "gemma3.attention.key_length": 128,
        "gemma3.attention.value_length": 128,
        "gemma3.attention.sliding_window": 1024,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
        "tokenizer.ggml.tokens": 262_144,
    }
    assert config_from_gguf(metadata) == presets.GEMMA3_27B


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "general.architecture",
            "llama",
            "expected architecture 'gemma', 'gemma2' or 'gemma3', got 'llama'",
        ),
        ("general.architecture", None, "or 'gemma3', got None"),
        ("gemma3.embedding_length", None, "'gemma3.embedding_length': is missing"),
        ("gemma3.embedding_length", "wide", "expected a number, got 'wide'"),
        ("gemma3.embedding_length", 0, "expected a whole number from 1"),
        ("gemma3.block_count", 1 << 31, "expected a whole number from 1 to 256"),
        ("gemma3.attention.head_count_kv", 3, "must be a multiple of num_kv_heads"),
        ("gemma3.attention.value_length", 16, "expected 32, got 16"),
        ("gemma3.attention.layer_norm_rms_epsilon", 1e-5, "expected 1e-06, got 1e-05"),
        ("gemma3.rope.freq_base", float("nan"), "expected a number, got nan"),
        ("gemma3.rope.scaling.type", "yarn", "expected 'linear', got 'yarn'"),
        ("gemma3.attention.sliding_window_pattern", 0, "expected a number from 1 to 256"),
        ("gemma3.attention.sliding_window_pattern", np.zeros(0, bool), "expected a number from 1"),
        (
            "gemma3.attention.sliding_window_pattern",
            "6",
            "expected a number from 1 to 256, got '6'",
        ),
        ("gemma3.rope.freq_base", -1.0, "expected a positive number, got -1"),
        ("gemma3.rope.scaling.type", np.zeros(2), "expected 'linear', got array"),
        ("general.architecture", np.zeros(2), "or 'gemma3', got array"),
        ("tokenizer.ggml.tokens", None, "'tokenizer.ggml.tokens' is missing"),
    ],
)
def test_impossible_metadata_are_refused(field, value, message):
    metadata = tiny.metadata() | {field: value}
    with pytest.raises(CheckpointError, match=message) as error:
        config_from_gguf(metadata, "file.gguf")
    assert "file.gguf" in str(error.value)


def test_official_params_compute_what_the_matrices_compute(tiny_gguf):
    """Projections (out, in) applied to a vector, against the einsums of the official layout."""
    params = layout.nest(official_params(GGUFFile(tiny_gguf), tiny.CONFIG))
    raw = tiny.tensors()
    n, k, h = tiny.CONFIG.num_heads, tiny.CONFIG.num_kv_heads, tiny.CONFIG.head_dim
    rng = np.random.default_rng(1)
    x, z, y = rng.normal(size=32), rng.normal(size=(n, h)), rng.normal(size=64)
    attn, mlp = params["layer_1"]["attn"], params["layer_1"]["mlp"]
    matrix = {name.split(".")[2]: array for name, array in raw.items() if name.startswith("blk.1.")}
    for actual, expected in [
        (np.einsum("d,ndh->nh", x, attn["q_einsum"]["w"]), (matrix["attn_q"] @ x).reshape(n, h)),
        (
            np.einsum("d,kdh->kh", x, attn["kv_einsum"]["w"][0]),
            (matrix["attn_k"] @ x).reshape(k, h),
        ),
        (
            np.einsum("d,kdh->kh", x, attn["kv_einsum"]["w"][1]),
            (matrix["attn_v"] @ x).reshape(k, h),
        ),
        (
            np.einsum("nh,nhd->d", z, attn["attn_vec_einsum"]["w"]),
            matrix["attn_output"] @ z.ravel(),
        ),
        (mlp["gating_einsum"][0] @ x, matrix["ffn_gate"] @ x),
        (mlp["gating_einsum"][1] @ x, matrix["ffn_up"] @ x),
        (y @ mlp["linear"], matrix["ffn_down"] @ y),
    ]:
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)
    assert np.array_equal(params["embedder"]["input_embedding"], raw["token_embd.weight"])


def test_norm_scales_lose_the_one_that_llama_cpp_adds(tiny_gguf):
    params = layout.nest(official_params(GGUFFile(tiny_gguf), tiny.CONFIG))
    raw, layer = tiny.tensors(), params["layer_0"]
    for scale, name in [
        (params["final_norm"], "output_norm"),
        (layer["attn"]["_query_norm"], "blk.0.attn_q_norm"),
        (layer["attn"]["_key_norm"], "blk.0.attn_k_norm"),
        (layer["pre_attention_norm"], "blk.0.attn_norm"),
        (layer["post_attention_norm"], "blk.0.post_attention_norm"),
        (layer["pre_ffw_norm"], "blk.0.ffn_norm"),
        (layer["post_ffw_norm"], "blk.0.post_ffw_norm"),
    ]:
        assert np.array_equal(scale["scale"], raw[f"{name}.weight"] - np.float32(1))


def test_official_params_have_the_names_of_the_linen_module(tiny_gguf):
    import jax

    from gemma_nb.model import GemmaTransformer

    expected = layout.flatten(GemmaTransformer.from_config(tiny.CONFIG).params)
    actual = dict(official_params(GGUFFile(tiny_gguf), tiny.CONFIG))
    assert jax.tree.map(np.shape, actual) == jax.tree.map(np.shape, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, "tensor 'blk.1.ffn_up.weight' is missing"),
        ({"blk.0.attn_k.weight": np.zeros((64, 32), np.float32)}, r"expected shape \(32, 32\)"),
        ({"output.weight": np.zeros((4, 32), np.float32)}, "tensor 'output.weight': a head of"),
    ],
)
def test_wrong_tensors_are_refused_before_any_is_read(tmp_path, monkeypatch, change, message):
    arrays = {k: v for k, v in (tiny.tensors() | change).items() if v is not None}
    file = GGUFFile(tiny.write(tmp_path / "x.gguf", arrays=arrays))
    monkeypatch.setattr(GGUFFile, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=message) as error:
        list(official_params(file, tiny.CONFIG))
    assert "x.gguf" in str(error.value)


# --- hostile files --------------------------------------------------------------------------------


def header(*, magic=b"GGUF", version=3, tensors=0, fields=0, rest=b"") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, fields) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape=(32,), kind=0, offset=0) -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


HUGE = (1 << 64) - 1
PAD = b"\0" * 4096


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"GG", "more bytes announced"),
        (header(magic=b"PK\3\4"), "it is a zip archive"),
        (header(version=1), "version: expected 2 or 3, got 1"),
        (header(version=3 << 24), "a big-endian file"),
        (header(tensors=HUGE), "tensor count: 18,446,744,073,709,551,615 entries announced"),
        (header(fields=HUGE), "field count: 18,446,744,073,709,551,615 entries announced"),
        (header(fields=1, rest=struct.pack("<Q", HUGE) + PAD), "a text of 18,446"),
        (header(fields=1, rest=text(b"\xff\xfe") + PAD), "is not UTF-8 text"),
        (header(fields=1, rest=text(b"k") + struct.pack("<I", 99) + PAD), "unknown value type 99"),
        (
            header(fields=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, HUGE) + PAD),
            "metadata field 'k': 18,446,744,073,709,551,615 entries",
        ),
        (
            header(fields=1, rest=text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 40) + PAD),
            "metadata field 'k': 1,099,511,627,776 entries",
        ),
        (
            header(fields=1, rest=text(b"k") + struct.pack("<IIQQ", 9, 8, 2, HUGE) + PAD),
            "metadata field 'k': a text of 18,446,744,073,709,551,615 bytes",
        ),
        (
            header(fields=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1) + text(b"\xff") + PAD),
            "metadata field 'k': entry 0 is not UTF-8",
        ),
        (header(fields=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + PAD), "array of arrays"),
        (
            header(fields=2, rest=2 * (text(b"k") + struct.pack("<IB", 0, 1)) + PAD),
            "metadata field 'k': occurs twice",
        ),
        (
            header(fields=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 24) + PAD),
            "expected a power of two, got 24",
        ),
        (header(tensors=1, rest=tensor(b"t", shape=()) + PAD), "1 to 4 dimensions, got 0"),
        (header(tensors=1, rest=tensor(b"t", shape=(1,) * 5) + PAD), "1 to 4 dimensions, got 5"),
        (header(tensors=1, rest=tensor(b"t", shape=(0, 4)) + PAD), "expected positive dimensions"),
        (header(tensors=1, rest=tensor(b"t", kind=77) + PAD), "unknown storage type 77"),
        (header(tensors=1, rest=tensor(b"t", shape=(33,), kind=8) + PAD), "whole Q8_0 blocks"),
        (header(tensors=1, rest=tensor(b"t", offset=3) + PAD), "offset 3 is not a multiple of 32"),
        (header(tensors=1, rest=tensor(b"t", shape=(HUGE,)) + PAD), "tensor 't': ends at byte"),
        (header(tensors=1, rest=tensor(b"t", offset=1 << 63) + PAD), "tensor 't': ends at byte"),
        (header(tensors=2, rest=2 * tensor(b"t") + PAD), "tensor 't': occurs twice"),
        (
            header(tensors=2, rest=tensor(b"a") + tensor(b"b", offset=32) + PAD),
            "tensor 'b': overlaps tensor 'a'",
        ),
    ],
)
def test_hostile_headers_are_refused_by_name(tmp_path, raw, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as error:
        GGUFFile(path)
    assert str(path) in str(error.value)
    remedy = r"; (download|pass|convert|update|unpack)|: download it again"
    assert re.search(remedy, str(error.value))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.gguf: No such file"):
        GGUFFile(tmp_path / "none.gguf")


def test_truncation_anywhere_is_noticed(tiny_gguf, tmp_path):
    raw = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    # The last bytes may be padding behind the last tensor.
    for size in np.linspace(1, len(raw) - 64, 150, dtype=int):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GGUFFile(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_headers_never_do_worse_than_refuse(tiny_gguf, tmp_path, data):
    raw = bytearray(tiny_gguf.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # Up to 12,000: the whole header and the first tensor.
        at = data.draw(st.integers(0, 12_000))
        change = data.draw(st.binary(min_size=1, max_size=8))
        raw[at : at + len(change)] = change
    path = tmp_path / "changed.gguf"
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError), GGUFFile(path) as file:
        config = config_from_gguf(file.metadata)
        shapes = [array.shape for _, array in official_params(file, config)]
        assert len(shapes) == len(list(layout.leaves(config)))


def test_an_undequantisable_type_is_refused(tmp_path):
    raw = header(tensors=1, rest=tensor(b"t", shape=(256,), kind=15) + PAD)  # Q8_K
    path = tmp_path / "odd.gguf"
    path.write_bytes(raw)
    file = GGUFFile(path)
    with pytest.raises(CheckpointError, match="tensor 't' is stored as Q8_K"):
        file.read("t")


@pytest.mark.real
def test_the_default_model_is_gemma3_270m():
    parts, _ = catalog.PACKAGES["gemma3-270m"].locate()
    with GGUFFile(parts) as file:
        assert config_from_gguf(file.metadata) == presets.GEMMA3_270M
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 262_144
        # q, k, v, output, their two norms, four more norms, and three of the feed-forward
        assert len(file.tensors) == 2 + 18 * 13
