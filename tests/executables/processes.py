"""A process that computes with a stored program."""

from __future__ import annotations

import json
import os
import subprocess
import sys

# In a process of its own: what it computed, how often it traced, and what it left in the folder.
CODE = """
import json, sys, threading
import jax
import jax.numpy as jnp
import numpy as np
from gemma_nb import executables
from gemma_nb.checkpoints.load import use_compilation_cache
from gemma_nb.cpu import products

use_compilation_cache()
exec(sys.argv[1])
executables.begin_prefetch("a model")
traced = []

def double(tree, x):
    traced.append(1)
    return {"y": products.product(x, tree["w"]) * 2}, x + 1

double = executables.CachedJit(double, "static", donate_argnums=1)
tree, x = {"w": jnp.arange(6.0).reshape(3, 2)}, jnp.ones((2, 2))
y, after = double(tree, x)
executables.end_prefetch()
print(json.dumps([y["y"].tolist(), after.tolist(), len(traced), x.is_deleted()]))
"""


EXPECTED = [[[2.0, 10.0, 18.0]] * 2, [[2.0, 2.0]] * 2]


def run(place, extra="", code=CODE):
    left = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") or k == left}
    environment = kept | {"GEMMA_NB_CACHE": str(place.parent)}
    command = [sys.executable, "-c", code, extra]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def programs(place):
    return sorted(place.glob("*/[!.s]*"))
