"""How far two results are apart, and sketches that say so from a few recorded numbers.

A whole result is large (logits of the default model: 0.8 GB), so a recording holds a *sketch*:
random projections of every row.  For a matrix R of independent random signs with m columns and
any difference d, |d R|^2 / m has mean |d|^2 and standard deviation below |d|^2 sqrt(2/m).  So

- the sketch of all logits gives their relative error without bias, to within about one part in a
  hundred (the T positions average out), although it never saw a single logit;
- the error at one position is estimated to within sqrt(1 / (2 m)) of itself, 12 % for m = 32;
- the one projection of each attention row cannot miss a wrong row except by cancellation: one
  wrong weight shows at full size, an error spread over keys at about its Euclidean norm.

No single estimate is a bound.  `test_live.py` holds the bounds, over every number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from tests.parity.cases import signs

COLUMNS = 32  # m, for logits
TOP = 10  # log-probabilities kept at each position
_CHUNK = 64  # rows turned to float64 at a time

# What is allowed: for logits these relative errors (over the whole, at any one position); for
# attention this many times the noise of the reference in float32 (where several runs are there, of
# the noisiest) against itself in float64.  The root mean square is held head by head.  The largest
# difference is held against its layer's, since that of one head is erratic: it varies by a factor
# of 1.3 (one standard deviation, of hundreds of heads) between two float32 runs that are equally
# good.
WHOLE, ANYWHERE = 1e-5, 1e-4
NOISE_FACTOR = 3.0


@dataclasses.dataclass(frozen=True)
class Result:
    """What a model computed for one text.

    Attributes:
      logits: (T, V).
      attention: (L, N, T, S).
    """

    logits: np.ndarray
    attention: np.ndarray


def _norms(x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """Euclidean norms of the rows of x, or of x - y; in float64."""
    out = np.empty(len(x))
    for i in range(0, len(x), _CHUNK):
        rows = x[i : i + _CHUNK].astype(np.float64)
        if y is not None:
            rows -= y[i : i + _CHUNK]
        out[i : i + _CHUNK] = np.linalg.norm(rows, axis=-1)
    return out


def relative(error: np.ndarray, size: np.ndarray) -> tuple[float, float]:
    """(over the whole, at the worst position), from norms per position."""
    whole = float(np.linalg.norm(error) / np.linalg.norm(size))
    return whole, float((error / size).max())


def logits_error(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Relative error of logits `a` (T, V) against `b`: (over the whole, at the worst position)."""
    return relative(_norms(a, b), _norms(b))


def attention_error(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far attention weights (L, N, T, S) `a` are from `b`, head by head.

    Returns:
      (L, N) largest absolute difference, and (L, N) root mean square difference.
    """
    largest, rms = [], []
    for layer_a, layer_b in zip(a, b, strict=True):
        difference = layer_a.astype(np.float64) - layer_b
        largest.append(np.abs(difference).max(axis=(1, 2)))
        rms.append(np.sqrt(np.mean(difference**2, axis=(1, 2))))
    return np.array(largest), np.array(rms)


@functools.cache
def _projection(vocabulary: int) -> np.ndarray:
    return signs((vocabulary, COLUMNS), 1) / np.sqrt(COLUMNS)


def _log_sum_exp(rows: np.ndarray) -> np.ndarray:
    """(T, 1) of (T, V) float64.  exp in float32: a thousandth of the noise, a third of the time."""
    top = rows.max(axis=-1, keepdims=True)
    terms = np.exp((rows - top).astype(np.float32))
    return top + np.log(terms.sum(axis=-1, keepdims=True, dtype=np.float64))


def _sketch_logits(rows: np.ndarray, top_ids: np.ndarray | None) -> dict[str, np.ndarray]:
    rows = rows.astype(np.float64)
    if top_ids is None:
        top_ids = np.argpartition(rows, -TOP, axis=-1)[:, -TOP:]
    return {
        "logits": rows @ _projection(rows.shape[-1]),
        "logits_norm": np.linalg.norm(rows, axis=-1),
        "top_ids": top_ids,
        "top_logprobs": np.take_along_axis(rows, top_ids, axis=-1) - _log_sum_exp(rows),
    }


def sketch(result: Result, top_ids: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The numbers that a recording keeps of a result, float64.

    Args:
      result: the whole result.
      top_ids: (T, TOP) token ids whose log-probabilities are kept; None takes the likeliest.

    Returns:
      logits: (T, COLUMNS) random projections, scaled so that norms estimate the rows' norms;
      logits_norm: (T,) exact norms of the rows;
      top_ids, top_logprobs: (T, TOP);
      attention: (L, N, T) one random projection of every row;
      attention_last: (L, N, S) the last query's weights.
    """
    pieces = [slice(i, i + _CHUNK) for i in range(0, len(result.logits), _CHUNK)]
    parts = [
        _sketch_logits(result.logits[p], None if top_ids is None else top_ids[p]) for p in pieces
    ]
    keys = signs((result.attention.shape[-1],), 2)
    return {
        **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        "attention": np.stack([layer @ keys for layer in result.attention]),
        "attention_last": result.attention[:, :, -1].astype(np.float64),
    }


def compare(got: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How far the sketch `got` is from the sketch `kept`.

    Returns:
      logits_whole, logits_anywhere: relative errors as `logits_error` has them, estimated;
      logprobs: largest absolute difference of the kept log-probabilities;
      attention: (L, N) root of the mean square, over rows, of the difference of projections: an
        estimate of the same for Euclidean norms of whole rows;
      attention_row: (L,) largest such difference of any row of the layer;
      attention_last: (L, N) largest absolute difference of the last query's weights.
    """
    error = np.linalg.norm(got["logits"] - kept["logits"].astype(np.float64), axis=-1)
    whole, anywhere = relative(error, kept["logits_norm"].astype(np.float64))
    logprobs, rows, last = (
        np.abs(got[name] - kept[name].astype(np.float64))
        for name in ("top_logprobs", "attention", "attention_last")
    )
    return {
        "logits_whole": np.asarray(whole),
        "logits_anywhere": np.asarray(anywhere),
        "logprobs": logprobs.max(),
        "attention": np.sqrt((rows**2).mean(axis=-1)),
        "attention_row": rows.max(axis=(1, 2)),
        "attention_last": last.max(axis=-1),
    }
