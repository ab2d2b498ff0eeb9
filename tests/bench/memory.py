"""`python -m tests.bench.memory [FOLDER]`: the peak memory of loading, as the kernel counts it.

The default model from its conversion and with it, and random checkpoints of 2.6 billion parameters
in bfloat16, which are written to FOLDER (16 GB; by default a temporary folder) and removed again.

Each load is a process of its own, whose VmHWM is printed: what `/usr/bin/time -v` calls "Maximum
resident set size", interpreter and libraries included.  Linux only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import gemma_nb as gnb
from gemma_nb.checkpoints import layout, orbax
from gemma_nb.checkpoints.memory import bytes_text
from gemma_nb.config import interleave

# As wide as Gemma 2 2B, with the layers and the vocabulary of Gemma 3.
CONFIG = dataclasses.replace(
    gnb.presets.by_name("gemma3-1b"),
    embed_dim=2304,
    hidden_dim=9216,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    layers=interleave(26, window=512),
    query_pre_attn_scalar=256.0,
)
FIELDS: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": CONFIG.num_embed,
    "hidden_size": CONFIG.embed_dim,
    "intermediate_size": CONFIG.hidden_dim,
    "num_hidden_layers": CONFIG.num_layers,
    "num_attention_heads": CONFIG.num_heads,
    "num_key_value_heads": CONFIG.num_kv_heads,
    "head_dim": CONFIG.head_dim,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "max_position_embeddings": CONFIG.max_context,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "hidden_activation": "gelu_pytorch_tanh",
}
_SHARD = 1 << 31  # bytes

_CHILD = """
import sys
import jax
import gemma_nb as gnb
model, tokenizer = gnb.load(sys.argv[1], progress=False)
loaded = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
print(loaded, peak)
"""


def peak(source: str | Path, **environment: str) -> tuple[int, int]:
    """Bytes of the parameters, and most bytes in use by a process that loads them."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(source)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    loaded, most = done.stdout.split()
    return int(loaded), int(most)


def random_params() -> Iterator[tuple[layout.Leaf, np.ndarray]]:
    """bfloat16 numbers in the shapes of CONFIG, one parameter at a time."""
    some = np.random.default_rng(0).normal(size=1 << 20).astype(ml_dtypes.bfloat16)
    for leaf in layout.leaves(CONFIG):
        yield leaf, np.resize(some, leaf.shape)


def write_hugging_face(folder: Path) -> None:
    """In shards of 2 GB, with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FIELDS))
    where: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}

    def write() -> None:
        name = f"model-{len(set(where.values())) + 1:05}.safetensors"
        save_file(shard, folder / name)
        where.update(dict.fromkeys(shard, name))
        shard.clear()

    for leaf, array in random_params():
        tensors = zip(leaf.hf, leaf.split(array), strict=True)
        shard.update((name, np.ascontiguousarray(tensor)) for name, tensor in tensors)
        if sum(tensor.nbytes for tensor in shard.values()) > _SHARD:
            write()
    write()
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_orbax(folder: Path) -> None:
    """As `model.save` does."""
    params = layout.nest((leaf.path, array) for leaf, array in random_params())
    orbax.save_params(params, CONFIG, folder)


def main(scratch: Path) -> None:
    """Measures and prints a table."""
    _, tokenizer = gnb.load("gemma3-270m", progress=False)
    rows = [("gemma3-270m", *peak("gemma3-270m"))]
    cold = peak("gemma3-270m", GEMMA_NB_CACHE=str(scratch / "cache"))
    rows.append(("gemma3-270m, converted first", *cold))
    for name, write in (("Hugging Face", write_hugging_face), ("Orbax", write_orbax)):
        folder = scratch / name.replace(" ", "-")
        write(folder)
        tokenizer.save_model(folder / "tokenizer.model")
        rows.append((f"{CONFIG.num_params() / 1e9:.2f}B, {name}", *peak(folder)))
    print(f"{'':30}{'parameters':>12}{'peak':>10}{'ratio':>8}")
    for title, loaded, most in rows:
        print(f"{title:30}{bytes_text(loaded):>12}{bytes_text(most):>10}{most / loaded:>8.2f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as made:
        main(Path(made))
