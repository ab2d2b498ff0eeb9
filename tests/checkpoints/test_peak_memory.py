"""Loading takes at most 1.3 times the memory of the parameters that it loads.

Measured as the kernel does (VmHWM in /proc/self/status, of the process since it started): for small
models above what the interpreter and its libraries take, for the default model with them.  What
`python -m tests.bench.memory` measures of one with 2.6 billion parameters is not repeated here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_nb.cache import cache_dir
from gemma_nb.checkpoints import layout, memory, orbax
from gemma_nb.config import interleave
from tests.checkpoints import tiny, written

# 122 million parameters, 244 MB in bfloat16: no layer is a large part of it, as in real models.
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    embed_dim=512,
    hidden_dim=2048,
    num_heads=4,
    head_dim=128,
    layers=interleave(32, window=16),
    query_pre_attn_scalar=128.0,
)
FIELDS = {
    **written.HF_CONFIG,
    **{"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 4, "head_dim": 128},
    **{"num_hidden_layers": 32, "query_pre_attn_scalar": 128},
}
PEAK = """
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

def read_once(leaves):
    for leaf in leaves:  # what is mapped comes into memory now
        np.asarray(leaf).view(np.uint8).max()
    return sum(leaf.nbytes for leaf in leaves)
"""
CODE = f"""
import sys
import jax
import numpy as np
from gemma_nb.checkpoints import load
{PEAK}
jax.device_put(1.0)
load.load_params(sys.argv[1], progress=False)  # a tiny one, for whatever is made once
before = peak()
params = load.load_params(sys.argv[2], progress=False)[1]
size = read_once(jax.tree.leaves(params))
print((peak() - before) / size)
"""
DEFAULT = f"""
import jax
import numpy as np
import gemma_nb as gnb
from gemma_nb.nn import Transformer
{PEAK}
jax.device_put(1.0)
before = peak()
model, tokenizer = gnb.load(progress=False)
loaded = peak()
size = read_once(jax.tree.leaves(model.params))
print(loaded / size, (peak() - before) / size)
"""

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux counts it")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    random = rng.normal(size=1 << 20).astype(ml_dtypes.bfloat16)
    return layout.nest((leaf.path, np.resize(random, leaf.shape)) for leaf in layout.leaves(CONFIG))


def measured(code, *arguments, **environment):
    """The numbers that a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [float(number) for number in done.stdout.split()]


def to_orbax(folder, params):
    written.tokenizer(orbax.save_params(params, CONFIG, folder))
    return folder


def to_hugging_face(folder, params):
    written.tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(FIELDS))
    tensors = layout.to_hf(params, CONFIG)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def to_gguf(folder, params):
    folder.mkdir()
    fields = {
        **tiny.FIELDS,
        "gemma3.embedding_length": CONFIG.embed_dim,
        "gemma3.feed_forward_length": CONFIG.hidden_dim,
        "gemma3.block_count": CONFIG.num_layers,
        "gemma3.attention.head_count": CONFIG.num_heads,
        "gemma3.attention.key_length": CONFIG.head_dim,
        "gemma3.attention.value_length": CONFIG.head_dim,
    }
    arrays = layout.to_gguf(params, CONFIG)
    arrays = {name: np.ascontiguousarray(a, np.float32) for name, a in arrays.items()}
    return tiny.write(folder / "model.gguf", fields=fields, arrays=arrays, quantize=True)


@pytest.mark.parametrize(
    ("small", "write"),
    [
        (written.orbax_saved, to_orbax),
        (written.hugging_face, to_hugging_face),
        (written.gguf_file, to_gguf),
    ],
)
def test_peak_memory_is_little_more_than_the_parameters(small, write, params, tmp_path):
    paths = [small(tmp_path / "small", written.params()), write(tmp_path / "large", params)]
    [ratio] = measured(CODE, *paths, GEMMA_NB_CACHE=str(tmp_path / "cache"))
    assert 0.9 < ratio < memory.LOADING


@pytest.mark.real
def test_the_default_model_from_its_conversion(real_model, tmp_path):
    """The whole process stays below; and what is computed with is in memory once.

    Beside it are the programs of the last start, which are loaded meanwhile and are of no size that
    the parameters have a part in (see `gemma_nb.executables`): here there are none.
    """
    for name in ("weights", "hashes"):
        (tmp_path / name).symlink_to(cache_dir() / name)
    loaded, used = measured(DEFAULT, GEMMA_NB_CACHE=str(tmp_path))
    assert loaded < memory.LOADING
    assert 0.9 < used < memory.LOADING


@pytest.mark.real
def test_the_default_model_with_its_conversion(real_model, tmp_path):
    loaded, used = measured(DEFAULT, GEMMA_NB_CACHE=str(tmp_path / "cache"))
    assert loaded < memory.LOADING
    assert used < memory.LOADING
