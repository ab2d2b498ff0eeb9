"""Labelled data as `gemma_nb.interp` makes it, of any length, in every script, without a model."""

from __future__ import annotations

import numpy as np
import pytest
import xarray

KINDS = ("sliding 8", "sliding 512", "global")
WORDS = (
    *(
        " The",
        " cat",
        "\n",
        "日",
        "本",
        "مرحبا",
        " بالعالم",
        "שלום",
        "😀",
        "🤖",
        "👩‍👩‍👧",
        " cafe\u0301",
    ),
    *(
        "<0xE4>",
        "$x$",
        "\\frac",
        "\u200f",
        "한국",
        "नमस्ते",
        "ไทย",
        "\x00",
        "",
        " extraordinarily_long",
    ),
)
LENGTHS = (5, 60, 2000)


def words(length: int) -> list[str]:
    return ["<bos>", *(WORDS[i % len(WORDS)] for i in range(length - 1))]


def roles(length: int) -> tuple[np.ndarray, list[str]]:
    """A system text, then turns by turns, as a chat's trace has them."""
    edges = np.linspace(0, length, 6).astype(int)[1:-1]
    turns = np.searchsorted(edges, np.arange(length), side="right")
    names = ["system", "user", "model", "user", "model"]
    return turns, [names[i] for i in turns]


def token_coords(length: int, dim: str = "position", *, chat: bool = True) -> dict:
    prefix = "" if dim == "position" else f"{dim}_"
    turns, speakers = roles(length)
    coords = {dim: np.arange(length), f"{prefix}token": (dim, words(length))}
    if chat:
        coords |= {f"{prefix}turn": (dim, turns), f"{prefix}role": (dim, speakers)}
    return coords


def make_attention(length: int, *, chat: bool = True, layers: int = 3) -> xarray.DataArray:
    """Random rows that sum to one over what each layer can reach, with a sink at position 0."""
    random = np.random.default_rng(length)
    query, key = np.ogrid[:length, :length]
    maps = np.zeros((layers, 4, length, length), np.float32)
    for i in range(layers):
        window = (8, 512, length)[i % 3]
        reach = (key <= query) & (key > query - window)
        raw = random.random((4, length, length), np.float32)
        for _ in range(3):
            raw *= raw
        raw = np.where(reach, raw + np.float32(1e-4), np.float32(0))
        raw[..., 0] *= 1 + 0.1 * length
        maps[i] = raw / raw.sum(-1, keepdims=True)
    coords = {
        "layer": np.arange(layers),
        "layer_kind": ("layer", [KINDS[i % 3] for i in range(layers)]),
        "head": np.arange(4),
        "kv_group": ("head", [0, 0, 1, 1]),
        **token_coords(length, "query", chat=chat),
        **token_coords(length, "key", chat=chat),
    }
    dims = ("layer", "head", "query", "key")
    return xarray.DataArray(maps, coords, dims, name="attention", attrs={"interventions": ""})


@pytest.fixture(scope="session", params=LENGTHS, ids=lambda n: f"{n} tokens")
def maps(request) -> xarray.DataArray:
    return make_attention(request.param)


@pytest.fixture(scope="session", params=LENGTHS, ids=lambda n: f"{n} tokens")
def length(request) -> int:
    """A short text, one that is labelled to the last token, one that is seen from afar."""
    return request.param


def make_turn(length: int):
    """A model's turn with evidence for every token."""
    from gemma_nb.chat.records import TokenRecord
    from gemma_nb.chat.turns import Turn

    random = np.random.default_rng(length)
    logprobs = -random.gamma(0.6, 2.0, length)
    tokens = tuple(
        TokenRecord(
            index=i,
            token_id=i,
            text=word,
            piece=word,
            position=10 + i,
            logprob=float(logprob),
            probability=float(np.exp(logprob)),
            entropy=float(-logprob * 1.3),
            rank=int(-logprob * 4),
            alternatives=(),
        )
        for i, (word, logprob) in enumerate(zip(words(length + 1)[1:], logprobs, strict=True))
    )
    return Turn(id=2, role="model", text="", tokens=tokens, finish_reason="stop")


def make_statistics(length: int) -> xarray.Dataset:
    """As `gnb.token_statistics`."""
    logprob = -np.random.default_rng(length).gamma(0.6, 2.0, length).astype(np.float32)
    logprob[0] = np.nan
    values = {
        "logprob": logprob,
        "probability": np.exp(logprob),
        "entropy": -logprob * 1.3,
        "rank": np.where(np.isnan(logprob), -1, -logprob * 4).astype(np.int32),
    }
    data = {name: ("position", array) for name, array in values.items()}
    return xarray.Dataset(data, token_coords(length), attrs={"interventions": ""})


def make_token_attribution(length: int) -> xarray.DataArray:
    values = np.random.default_rng(length).normal(size=length).astype(np.float32)
    attrs = {"interventions": "", "method": "gradient_x_input", "target": " cat"}
    dims = ("position",)
    return xarray.DataArray(
        values, token_coords(length), dims, name="gradient_x_input", attrs=attrs
    )


def layer_coords(layers: int) -> dict:
    return {
        "layer": np.arange(layers),
        "layer_kind": ("layer", [KINDS[1 + (i % 6 == 5)] for i in range(layers)]),
    }


def make_lens(length: int, layers: int = 18) -> xarray.Dataset:
    """As `gnb.logit_lens`: certain of the next token at the end, of anything at the beginning."""
    random = np.random.default_rng(length)
    text = words(length)
    depth = np.arange(layers)[:, None, None] / (layers - 1)
    logits = random.normal(size=(layers, length, 3)) + 6 * depth * [1.0, 0.4, 0.0]
    logits = -np.sort(-logits, axis=-1)
    logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True)) - 2 * (1 - depth)
    predicted = random.choice(np.array(WORDS[:18], object), size=(layers, length, 3))
    predicted[-3:, :-1, 0] = text[1:]
    entropy = 12 * (1 - depth[..., 0]) + random.random((layers, length))
    dims = ("layer", "position")
    data = {
        "token": ((*dims, "rank"), predicted.astype(str)),
        "logit": ((*dims, "rank"), logits),
        "logprob": ((*dims, "rank"), logprob),
        "probability": ((*dims, "rank"), np.exp(logprob)),
        "entropy": (dims, entropy),
        "kl": (dims, entropy - entropy[-1:] + 1),
        "watched_logprob": ((*dims, "watched"), logprob[..., :2] - 1),
        "watched_rank": ((*dims, "watched"), random.integers(0, 9999, (layers, length, 2))),
    }
    coords = {
        **layer_coords(layers),
        **token_coords(length),
        "input_token": ("position", text),
        "rank": np.arange(3),
        "watched": [7, 9],
        "watched_token": ("watched", [" cat", "日"]),
    }
    del coords["token"]  # here a prediction
    return xarray.Dataset(data, coords, attrs={"interventions": ""})


def make_norms(length: int, layers: int = 18) -> xarray.Dataset:
    """As `gnb.residual_norms`, with an enormous first position."""
    random = np.random.default_rng(length)
    grow = np.exp(np.arange(layers) / 5)[:, None] * random.lognormal(0, 0.3, (layers, length))
    grow[:, 0] *= 50
    data = {"residual": grow * 40, "attn_out": grow * 3, "mlp_out": grow * 5}
    coords = {**layer_coords(layers), **token_coords(length)}
    return xarray.Dataset(
        {name: (("layer", "position"), x.astype(np.float32)) for name, x in data.items()},
        coords,
        attrs={"interventions": ""},
    )


def make_attribution(length: int, by: str = "component", layers: int = 18) -> xarray.DataArray:
    """As `gnb.direct_logit_attribution`."""
    parts = [f"H{h}" for h in range(4)] if by == "head" else ["attn"]
    names = ["embed", *(f"L{i}.{part}" for i in range(layers) for part in [*parts, "mlp"])]
    random = np.random.default_rng(length)
    values = random.normal(size=(len(names), length)).astype(np.float32) ** 3
    coords = {"component": names, **token_coords(length)}
    attrs = {"interventions": "", "token": " Paris", "token_id": 5, "units": "logits"}
    return xarray.DataArray(values, coords, ("component", "position"), name="logit", attrs=attrs)


def make_sweep(length: int, *over: str, layers: int = 18) -> xarray.DataArray:
    """As `gnb.activation_patching`."""
    sizes = {"layer": layers, "position": length, "head": 4}
    random = np.random.default_rng(length)
    values = -1.2 + 3.0 * random.random([sizes[d] for d in over]).astype(np.float32) ** 6
    coords: dict = {}
    if "layer" in over:
        coords |= layer_coords(layers)
    if "position" in over:
        coords |= token_coords(length, chat=False)
        clean = words(length)
        clean[2] = " Rome"
        coords["clean_token"] = ("position", clean)
    if "head" in over:
        coords |= {"head": np.arange(4), "kv_group": ("head", [0] * 4)}
    attrs = {"metric": "logit of Paris", "clean": 1.9, "corrupted": -1.2, "site": "residual"}
    return xarray.DataArray(values, coords, over, attrs={"interventions": "", **attrs})


def make_head_statistics(layers: int = 18) -> xarray.Dataset:
    """As `gnb.head_statistics`, with two heads that stand out."""
    random = np.random.default_rng(0)
    names = ("previous_token", "bos_sink", "local", "entropy", "induction")
    data = {name: random.beta(0.5, 4, (layers, 4)).astype(np.float32) for name in names}
    data["induction"][7, 2], data["previous_token"][4, 1] = 0.93, 0.88
    coords = {**layer_coords(layers), "head": np.arange(4), "kv_group": ("head", [0] * 4)}
    return xarray.Dataset(
        {name: (("layer", "head"), x) for name, x in data.items()},
        coords,
        attrs={"interventions": ""},
    )
