"""Computes on eight simulated devices what one computes, and prints both as JSON.

Run by test_placement.py, in a process of its own: JAX counts its devices once.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import gemma_nb as gnb
from gemma_nb import placement
from gemma_nb.config import TransformerConfig, interleave
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.weights import decoding_weights

TOKENS = np.arange(2 * 12).reshape(2, 12)
PROMPT = list(range(3, 43))  # longer than the window


def random_model(num_kv_heads: int) -> gnb.GemmaTransformer:
    config = TransformerConfig(
        num_embed=320,
        embed_dim=64,
        hidden_dim=128,
        num_heads=8,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        layers=interleave(2, window=8, pattern=(False, True)),
        query_pre_attn_scalar=16,
        max_context=1024,
    )
    model = gnb.GemmaTransformer.from_config(config, key=jax.random.key(0))
    # Larger weights: the layers then outweigh the embedding, and replies do not repeat themselves.
    return model.edit("layer_*/*/**", lambda w: 8 * w)


def logits(model: gnb.GemmaTransformer) -> np.ndarray:
    return model(gnb.GemmaInputs.from_basic_segments(TOKENS)).values


def decoder(model: gnb.GemmaTransformer) -> tuple[Decoder, list[int]]:
    """A greedy reply, and the decoder that made it."""
    stream = Decoder(model, limit=256, top_k=3)
    first = stream.prefill(stream.begin(PROMPT, gnb.Sampling(temperature=0, seed=0)))
    assert first is not None
    return stream, [int(first.token), *(int(stream.step().token) for _ in range(15))]


def shares(tree: Any) -> list[float]:
    """Bytes on each device."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return list(held.values())


def fractions(tree: Any) -> list[float]:
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    return [n / total for n in shares(tree)]


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def meshes() -> dict[str, Any]:
    devices = np.array(jax.devices())
    return {
        "auto": "auto",
        "batch and model": Mesh(devices.reshape(2, 4), ("batch", "model")),
        "heads and feed_forward": Mesh(devices.reshape(2, 2, 2), ("data", "heads", "feed_forward")),
    }


def compare(model: gnb.GemmaTransformer, *names: str) -> dict[str, Any]:
    expected, (_, reply) = logits(model), decoder(model)
    results: dict[str, Any] = {"one device": reply, "logits": float(np.abs(expected).sum())}
    for name in names:
        placed = model.place(meshes()[name])
        assert placed.mesh is not None
        stream, again = decoder(placed)
        where = placement.cache_shardings(model.config, placed.mesh)
        cache = model.transformer.init_cache(
            batch_size=1, dtype=np.float32, cache_length=16, sharding=where
        )
        assert stream._cache is not None
        results[name] = {
            "devices": placed.mesh.size,
            "logits error": error(logits(placed), expected),
            "reply": again,
            "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
            "params": shares(placed.params),
            "decoding weights": shares(decoding_weights(placed)),
            "cache": fractions((stream._cache.k, stream._cache.v)),
            "cache of the model": fractions([[x["k"], x["v"]] for x in cache.values()]),
        }
    return results


def loaded(folder: Path) -> dict[str, Any]:
    """A checkpoint by way of `gnb.load`."""
    from tests.checkpoints import written

    os.environ["GEMMA_NB_CACHE"] = str(folder / "cache")
    path = written.hugging_face(folder / "hf", written.params())
    one, tokenizer = gnb.load(path, dtype="float32", progress=False)
    eight, _ = gnb.load(path, dtype="float32", mesh="auto", progress=False)
    assert eight.mesh is not None
    table = eight.params["layer_0"]["mlp"]["linear"]
    traces = [
        gnb.trace(model, "the th", tokenizer=tokenizer).attention.values for model in (one, eight)
    ]
    return {
        "mesh": dict(eight.mesh.shape),
        "largest part": max(s.data.nbytes for s in table.addressable_shards) / table.nbytes,
        "logits": float(np.abs(logits(one)).sum()),
        "logits error": error(logits(eight), logits(one)),
        "trace error": error(traces[1], traces[0]),
    }


def main() -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    results = {
        "many heads": compare(random_model(8), *meshes()),
        "one key-value head": compare(random_model(1), "auto"),
    }
    with tempfile.TemporaryDirectory() as folder:
        results["loaded"] = loaded(Path(folder))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
