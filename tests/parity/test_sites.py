"""Every capture site against hooks in the reference, run here and now: `make parity`.

Allowed is what the reference in float32 differs from itself in float64: in root mean square twice
that for each layer of each site, for the largest difference three times.  Its float32 runs are
several, which differ only in the order of their sums and in who multiplies, since the largest of
some ten thousand rounding errors varies more from run to run (up to 2.6 times) than this test is to
allow, and how exact a product is depends on its library, on every processor in another way (see
`reference.multiplied_by`).  So the noise is that of the library whose products are the least exact
there: torch's, numpy's, or XLA's, which ours is computed with.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
from tests.parity.cases import RANDOM, REAL, model_of, text
from tests.parity.measure import NOISE_FACTOR

pytestmark = pytest.mark.live

# Past the window of the default model's sliding layers.
REAL_LENGTH = 560
# Computed from other sites; tests/interp holds them to their definitions.
DERIVED = {"scores", "head_out"}
# So many float32 runs of the reference for each other library, their sums in other orders.
SHUFFLED = 2
RMS_FACTOR = 2.0
# Not of a layer: (T, ...).
WHOLE = {"embed", "final", "final_rms", "logits"}


@pytest.fixture(scope="module", params=[*RANDOM, REAL])
def sites(request: pytest.FixtureRequest) -> Iterator[dict[str, tuple[np.ndarray, ...]]]:
    """Site -> ours, the reference in float64, and in float32 once for each library and order."""
    with warnings.catch_warnings():
        # What torch and transformers deprecate inside themselves is not ours to mend.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        from tests.parity import hooks, reference
    if request.param == REAL:
        model, tokenizer = gnb.load(REAL, dtype="float32", progress=False)
        tokens = np.array(tokenizer.encode(text(), bos=True)[:REAL_LENGTH], np.int32)
    else:
        model, tokens = model_of(RANDOM[request.param]), RANDOM[request.param].tokens()
    theirs = reference.build(model.params, model.config)
    singles = [hooks.capture(theirs, model.config, tokens)]
    for times in (np.matmul, jnp.matmul):
        for seed in range(SHUFFLED):
            with reference.multiplied_by(times, seed):
                singles.append(hooks.capture(theirs, model.config, tokens))
    double = hooks.capture(theirs.double(), model.config, tokens)
    trace = gnb.trace(model, tokens, sites=())
    names = [s.name for s in gnb.list_sites(model) if s.name not in DERIVED]
    yield {
        name: (trace.get(name).values, double[name], *(run[name] for run in singles))
        for name in names
    }
    gc.collect()


def test_all_sites_agree(sites: dict[str, tuple[np.ndarray, ...]]) -> None:
    worst: dict[str, tuple[float, float]] = {}
    for name, (ours, double, *singles) in sites.items():
        assert all(values.shape == ours.shape for values in (double, *singles)), name
        if name == "logits":
            axes: tuple[int, ...] = (0, 1)
        elif name in WHOLE:
            axes = tuple(range(ours.ndim))
        else:
            axes = tuple(range(1, ours.ndim))
        errors = [x.astype(np.float64) - double for x in (ours, *singles)]
        rms, *noises = (np.sqrt(np.mean(x**2, axis=axes)) for x in errors)
        # Of the usual run, then of each other library's.
        starts = range(1, len(noises), SHUFFLED)
        libraries = [noises[:1], *(noises[i : i + SHUFFLED] for i in starts)]
        noise_rms = np.max([np.sqrt(np.mean(np.square(x), axis=0)) for x in libraries], axis=0)
        most, *mosts = (np.abs(x).max(axis=axes) for x in errors)
        noise_most = np.max(mosts, axis=0)
        # Where the reference makes no error at all (the embedding), one rounding is allowed.
        rounding = np.finfo(np.float32).eps * np.abs(double).max(axis=axes)
        worst[name] = (
            float(np.max(rms / np.maximum(noise_rms, rounding))),
            float(np.max(most / np.maximum(noise_most, 2 * rounding))),
        )
    print({name: [round(share, 2) for share in shares] for name, shares in worst.items()})
    for name, (in_rms, at_most) in worst.items():
        assert in_rms <= RMS_FACTOR, name
        assert at_most <= NOISE_FACTOR, name
