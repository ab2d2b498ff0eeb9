"""A layer's cache with transposed values holds, and makes of a query, what one without does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb.cpu.attention import attend_by_one
from gemma_nb.nn.attention import _weigh, attend
from gemma_nb.nn.kv_cache import GrowingCache, RingCache, in_rows

SIZE, KV_HEADS, HEAD_DIM = 8, 2, 4


def empty(*, transposed):
    shape = (1, SIZE, KV_HEADS, HEAD_DIM)
    values = {"vt": jnp.zeros((1, KV_HEADS, HEAD_DIM, SIZE))} if transposed else {}
    return {
        "k": jnp.zeros(shape),
        **(values or {"v": jnp.zeros(shape)}),
        "positions": jnp.full((1, SIZE), -1, jnp.int32),
        "end_index": jnp.zeros(1, jnp.int32),
    }


def tokens(start, count, padding=0):
    rng = np.random.default_rng(start)
    k, v = rng.normal(size=(2, 1, count + padding, KV_HEADS, HEAD_DIM)).astype(np.float32)
    positions = np.r_[np.arange(start, start + count), [-1] * padding].astype(np.int32)
    return {"k": jnp.asarray(k), "v": jnp.asarray(v), "positions": jnp.asarray(positions[None])}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name], err_msg=name)


@pytest.mark.parametrize("kind", [GrowingCache, RingCache])
def test_transposed_values_are_the_same_values(kind):
    plain, other = kind(empty(transposed=False)), kind(empty(transposed=True))
    start = 0
    # The last ones go round a ring, once and more, and are dropped without one.
    pieces = ((3, 2), (1, 0), (1, 0), (2, 0), (1, 0), (1, 0), (4, 1), (11, 5), (17, 0), (2, 14))
    for count, padding in pieces:
        new = tokens(start, count, padding)
        seen, plain = plain.append(new)
        found, other = other.append(new)
        assert ("vt" in found) == (count + padding == 1)
        assert "vt" in other.arrays
        assert_equal(in_rows(found), seen)
        assert_equal(in_rows(other.arrays), plain.arrays)
        start += count


@pytest.mark.parametrize("transposed", [False, True])
def test_a_rewound_cache_goes_on_as_one_that_never_went_further(transposed):
    short, long = (GrowingCache(empty(transposed=transposed)) for _ in range(2))
    short, long = (cache.append(tokens(0, 3, 1))[1] for cache in (short, long))
    long = long.append(tokens(3, 4))[1].rewind(jnp.int32(3))
    assert_equal(
        {n: long.arrays[n] for n in ("positions", "end_index")},
        {n: short.arrays[n] for n in ("positions", "end_index")},
    )
    assert long.positions.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1]]
    _, short = short.append(tokens(3, 5))
    _, long = long.append(tokens(3, 5))
    assert_equal(long.arrays, short.arrays)


def test_a_ring_holds_the_last_window():
    ring = RingCache(empty(transposed=False))
    _, ring = ring.append(tokens(0, SIZE))
    seen, ring = ring.append(tokens(SIZE, 3))
    assert ring.positions.tolist() == [[8, 9, 10, 3, 4, 5, 6, 7]]
    assert seen["positions"].tolist() == [[*range(SIZE + 3)]]


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_single_query_attends_as_many_do(soft_cap, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, 1, 3 * KV_HEADS, HEAD_DIM)).astype(dtype)
    k, v = (jax.random.normal(key, (1, SIZE, KV_HEADS, HEAD_DIM)).astype(dtype) for key in keys[1:])
    mask = jnp.asarray([[[True, False, True, True, True, False, True, False]]])
    expected = attend(q, k, v, mask, soft_cap=soft_cap)
    # What is not seen may be anything.
    k, v = (jnp.where(mask[0, 0, :, None, None], x, jnp.nan) for x in (k, v))
    vt = jnp.moveaxis(v, 1, -1)
    weigh = partial(_weigh, allowed=mask[0], soft_cap=soft_cap)
    found = jax.jit(partial(attend_by_one, weigh=weigh))(q, k, vt, mask)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert ours.shape == theirs.shape
        tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(
            ours.astype(np.float32), theirs.astype(np.float32), atol=tolerance, rtol=tolerance
        )
