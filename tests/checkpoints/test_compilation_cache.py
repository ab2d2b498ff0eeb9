from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import jax
jax.jit(lambda x: x * 2)(1.0)  # JAX has decided by now that there is no cache
from gemma_nb.checkpoints.load import use_compilation_cache
use_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 3)(1.0)
print(jax.config.jax_compilation_cache_dir)
"""


def run(tmp_path, **extra):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment = kept | {"GEMMA_NB_CACHE": str(tmp_path / "ours")} | extra
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_compiled_programs_are_kept_below_the_cache_folder(tmp_path):
    assert run(tmp_path) == str(tmp_path / "ours" / "jax")
    assert list((tmp_path / "ours" / "jax").iterdir())


def test_a_folder_that_the_user_chose_stays(tmp_path):
    theirs = str(tmp_path / "theirs")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=theirs) == theirs
    assert not (tmp_path / "ours").exists()
