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
        raw = np.where(reach, random.random((4, length, length)) ** 8 + 1e-4, 0)
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
    return xarray.DataArray(maps, coords, dims, name="attention", attrs={"interventions": []})


@pytest.fixture(scope="session", params=LENGTHS, ids=lambda n: f"{n} tokens")
def maps(request) -> xarray.DataArray:
    return make_attention(request.param)
