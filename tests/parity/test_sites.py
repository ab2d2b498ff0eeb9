"""Every capture site against hooks in the reference, run here and now: `make parity`.

Allowed is what the reference in float32 differs from itself in float64, times three: in root mean
square for each layer of each site, and for the largest difference too.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

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


@pytest.fixture(scope="module", params=[*RANDOM, REAL])
def sites(request: pytest.FixtureRequest) -> Iterator[dict[str, tuple[np.ndarray, ...]]]:
    """Site -> ours, the reference in float32, and in float64."""
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
    single = hooks.capture(theirs, model.config, tokens)
    double = hooks.capture(theirs.double(), model.config, tokens)
    trace = gnb.trace(model, tokens, sites=())
    names = [s.name for s in gnb.list_sites(model) if s.name not in DERIVED]
    yield {name: (trace.get(name).values, single[name], double[name]) for name in names}
    gc.collect()


def test_all_sites_agree(sites: dict[str, tuple[np.ndarray, ...]]) -> None:
    worst: dict[str, float] = {}
    for name, (ours, single, double) in sites.items():
        assert ours.shape == single.shape == double.shape, name
        if name == "logits":
            axes: tuple[int, ...] = (0, 1)
        elif name in ("embed", "final", "final_rms"):
            axes = tuple(range(ours.ndim))
        else:
            axes = tuple(range(1, ours.ndim))
        error, noise = ours.astype(np.float64) - double, single.astype(np.float64) - double
        rms, noise_rms = (np.sqrt(np.mean(x**2, axis=axes)) for x in (error, noise))
        most, noise_most = (np.abs(x).max(axis=axes) for x in (error, noise))
        # Where the reference makes no error at all (the embedding), one rounding is allowed.
        rounding = np.finfo(np.float32).eps * np.abs(double).max(axis=axes)
        worst[name] = float(np.max(rms / np.maximum(noise_rms, rounding)))
        assert (rms <= NOISE_FACTOR * np.maximum(noise_rms, rounding)).all(), name
        assert (most <= NOISE_FACTOR * np.maximum(noise_most, 2 * rounding)).all(), name
    print({name: round(share, 2) for name, share in worst.items()}, "times the noise")
