"""What all tests share: strictness, hypothesis's settings, and the two models they run on.

The converted default model and JAX's compiled programs live in the user's cache folder, or where
GEMMA_NB_CACHE says, as they do outside the tests: a second run of the tests does not convert again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax._src import compiler

import gemma_nb as gnb
import tests.tiny
import tests.typecheck
from gemma_nb import executables
from gemma_nb.checkpoints.load import use_compilation_cache

if TYPE_CHECKING:
    from gemma_nb.model import GemmaTransformer
    from gemma_nb.text.tokenizer import Tokenizer

# What computes with arrays is held to the shapes and dtypes in its annotations.  Left out: modules
# that check their callers' values themselves, or whose records hold numpy arrays once on the host.
jaxtyping.install_import_hook(
    [
        *(f"gemma_nb.nn.{name}" for name in ("linear", "norms", "embedder", "rope", "masks")),
        *(f"gemma_nb.nn.{name}" for name in ("attention", "feed_forward", "layer", "transformer")),
        *(f"gemma_nb.cpu.{name}" for name in ("attention", "feed_forward", "top_k")),
    ],
    f"{tests.typecheck.__name__}.checked",
)

# From the first test on, also without the default model: the processes of one run, and the next
# run, compile most programs once.
use_compilation_cache()

PARITY = Path(__file__).parent / "parity"

# A float32 array never meets a bfloat16 one by accident.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# What is drawn at CI is always the same; at home every run looks elsewhere.
hypothesis.settings.register_profile(
    "gemma_nb", deadline=None, print_blob=True, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("gemma_nb")


# Fusions by way of MLIR are half and more of what a small program takes to compile; the older way
# computes the same.
_QUICK = {"xla_cpu_use_fusion_emitters": False}
_options_of = compiler.get_compile_options


def _can_be_quick() -> bool:
    """Whether this XLA knows the option; newer ones do not."""
    try:
        jax.jit(jnp.add).lower(1.0, 1.0).compile(compiler_options=_QUICK)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _compile_options(*args: Any, **kwargs: Any) -> Any:
    if jax.config.values["jax_disable_most_optimizations"]:
        kwargs["env_options_overrides"] = _QUICK | (kwargs.get("env_options_overrides") or {})
    return _options_of(*args, **kwargs)


CAN_BE_QUICK = _can_be_quick()
XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
QUICK_XLA_FLAGS = f"{XLA_FLAGS} --xla_cpu_use_fusion_emitters=false".strip()
if CAN_BE_QUICK:
    compiler.get_compile_options = _compile_options


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="K/N", help="run the K-th of N parts of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes one part of the tests; what takes long comes first, so that no process is left with it.

    Dealt out are files, and where a fixture of a module has several values, each of these.
    """
    long = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in long)
    if part := config.getoption("--part"):
        number, of = map(int, part.split("/"))
        if not 1 <= number <= of:
            raise pytest.UsageError(f"expected --part K/N with K from 1 to N, got {part}")
        groups = {group: i for i, group in enumerate(dict.fromkeys(map(_group, items)))}
        mine = [item for item in items if groups[_group(item)] % of == number - 1]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
        items[:] = mine


def _group(item: pytest.Item) -> tuple[str, ...]:
    """Tests of one group share what takes long to make."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return (str(item.path),)
    values, fixtures = item.callspec.params, item._fixtureinfo.name2fixturedefs
    wide = [name for name in values if name in fixtures and fixtures[name][-1].scope == "module"]
    return str(item.path), *(str(values[name]) for name in wide)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Leaves out most of XLA's optimisations where small models are computed with.

    To compile takes most of the tests' time, and half without.  What is held to numbers of other
    implementations, or runs on the default model, is compiled as it is for users.
    """
    marked = item.get_closest_marker("real") or item.get_closest_marker("optimized")
    optimized = bool(marked or PARITY in item.path.parents)
    if optimized and jax.config.values["jax_disable_most_optimizations"]:
        # JAX would run what it has compiled without them, whatever is set now.
        jax.clear_caches()
        executables.forget()
    jax.config.update("jax_disable_most_optimizations", not optimized)
    # Of processes that it starts:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not optimized))
    os.environ["XLA_FLAGS"] = XLA_FLAGS if optimized or not CAN_BE_QUICK else QUICK_XLA_FLAGS
    return (yield)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Lets go of compiled programs before there are too many.

    Each is several memory mappings, of which Linux allows a process 65,530 by default; XLA crashes
    when it gets no more.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        executables.forget()


@pytest.fixture(scope="session")
def real_model() -> tuple[GemmaTransformer, Tokenizer]:
    """The default model, as `gnb.load` gives it; mark the test `real`."""
    return gnb.load("gemma3-270m", progress=False)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """Bytes and control pieces: one token per byte of UTF-8, except for spaces and line breaks."""
    return tests.tiny.tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: Tokenizer) -> tuple[GemmaTransformer, Tokenizer]:
    """A random model of two sliding layers and a global one; it compiles in a moment."""
    return tests.tiny.model(tiny_tokenizer.vocab_size), tiny_tokenizer


@pytest.fixture(scope="session")
def score(
    tiny_model: tuple[GemmaTransformer, Tokenizer],
) -> Callable[[Sequence[int]], np.ndarray]:
    """Log-probabilities of all tokens at each position, by one pass over the whole text."""
    model, _ = tiny_model
    run = jax.jit(model.transformer.apply)

    def log_probabilities(ids: Sequence[int]) -> np.ndarray:
        # Later tokens change nothing, so one length, and one compilation, serves all.
        padded = jnp.asarray([[*ids, *[0] * (400 - len(ids))]])
        # Float64 from here on: only the model itself is under test.
        logits = np.asarray(run({"params": model.params}, padded).logits[0, : len(ids)], float)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return log_probabilities
