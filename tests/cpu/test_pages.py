import sys

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb.cpu.pages import _ranges, adjoining, use_huge_pages

ARRAYS = [
    np.arange(35, dtype=np.float32).reshape(5, 7),
    np.arange(-64, 64, dtype=np.int8).reshape(2, 64),
    np.arange(12, dtype=np.float32).reshape(3, 4).astype(jnp.bfloat16),
    np.zeros((0, 3), np.float32),
]


def test_copies_equal_what_they_copy():
    given = [jnp.asarray(x) for x in ARRAYS]
    copies = adjoining(given)
    for copy, array in zip(copies, ARRAYS, strict=True):
        assert copy.dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(copy), array)
    assert adjoining([]) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's pages")
def test_copies_lie_one_behind_the_other_from_a_huge_page_on():
    given = [jnp.full((1000,), i, jnp.float32) for i in range(3)]
    copies = adjoining(given)
    where = [copy.unsafe_buffer_pointer() for copy in copies]
    assert where[0] % (2 << 20) == 0
    assert np.diff(where).tolist() == [4032, 4032]  # 4000 bytes, in whole cache lines
    assert given == []  # so that what nobody else holds is freed meanwhile
    assert _ranges(copies) == [(where[0], where[2] + 4000)]
    assert _ranges(copies[::-1]) == [(at, at + 4000) for at in reversed(where)]


def test_copies_outlive_the_call():
    total = sum(float(jnp.sum(x)) for x in adjoining([jnp.ones((1 << 20,), jnp.float32)] * 3))
    assert total == 3 << 20


def test_moved_arrays_stay_what_and_where_they_are():
    rows = [np.arange(i, i + (1 << 20), dtype=np.float32) for i in range(3)]
    copies = adjoining([jnp.asarray(x) for x in rows])
    where = [copy.unsafe_buffer_pointer() for copy in copies]
    for _ in range(2):
        use_huge_pages([*copies, jnp.ones(3)])
    assert [copy.unsafe_buffer_pointer() for copy in copies] == where
    for copy, array in zip(copies, rows, strict=True):
        np.testing.assert_array_equal(np.asarray(copy), array)
    use_huge_pages([])
