"""Indices as people write them.  The reference is what numpy selects of an array."""

import jax.numpy as jnp
import numpy as np
import pytest
import xarray

from gemma_nb.indices import among, ascending, indices, number, one, one_among

COUNT = 5
MASK = np.array([True, False, True, False, False])


@pytest.mark.parametrize(
    "given",
    [
        *(3, -1, np.int64(3), np.uint8(4), np.array(2), jnp.int32(4), xarray.DataArray(2)),
        *([1, 4], (4, 1, 1), range(0, 5, 2), [-1, 0], np.array([3, 0]), jnp.array([1, -5])),
        *(slice(None), slice(1, None, 2), slice(-2, None), slice(3, 99), xarray.DataArray([3, 1])),
        *(MASK, MASK.tolist(), tuple(MASK), jnp.asarray(MASK), xarray.DataArray(MASK)),
    ],
    ids=repr,
)
def test_what_numpy_selects_is_selected(given):
    array = np.arange(COUNT)
    plain = np.asarray(given) if not isinstance(given, slice | tuple | range) else given
    expected = np.atleast_1d(array[list(plain) if isinstance(plain, tuple | range) else plain])
    assert indices(given, COUNT, "layer") == tuple(expected)
    assert ascending(given, COUNT, "layer") == tuple(np.unique(expected))


def test_none_is_all_and_iterators_are_lists():
    assert indices(None, COUNT, "layer") == tuple(range(COUNT))
    assert indices((i for i in (3, 2)), COUNT, "layer") == (3, 2)
    assert indices([np.int64(1), jnp.int32(2), np.array(3)], COUNT, "layer") == (1, 2, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *((x, "layers must be whole numbers") for x in (2.0, [2.0], np.array(2.0), "all", ...)),
        *((x, "layers must be whole numbers") for x in ([[1]], np.ones((1, 1), int), 2**70)),
        *((x, "the truth value True") for x in (True, np.True_, jnp.bool_(True), np.array(True))),
        ([True, 2], "layers mixes truth values and numbers"),
        (MASK[:4], "layers is a mask of 4, and there are 5 layers"),
        ([True], "layers is a mask of 1"),
        (5, "layer 5 does not exist: there are 0 to 4"),
        (-6, "layer -6 does not exist"),
        *(
            (x, "layers is empty: name at least one layer")
            for x in ([], np.array([]), slice(9, 10))
        ),
        (np.zeros(5, bool), "layers is empty"),
        (slice(1.0, 2), "layers must be a whole number, got 1.0|layers must be whole numbers"),
    ],
    ids=repr,
)
def test_what_is_no_index_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        indices(given, COUNT, "layer")


def test_one_index_is_a_number_or_a_list_of_one():
    for given in (3, [3], np.array(3), np.arange(5) == 3, slice(3, 4), -2):
        assert one(given, COUNT, "layer") == 3
    with pytest.raises(ValueError, match=r"layer takes one layer, got 2: \[3, 4\]"):
        one([3, 4], COUNT, "layer")
    for given in (None, True, 2.0):
        with pytest.raises(ValueError, match="layer must"):
            one(given, COUNT, "layer")
    assert number(np.array([7]), "token") == 7
    for given in (True, 2.5, "7", [True], slice(1), []):
        with pytest.raises(ValueError, match="token must be"):
            number(given, "token")


def test_numbers_that_an_array_holds():
    known = [1, 3, 5]
    assert among(None, known, "layer") == known
    assert among([5, 1], known, "layer") == [5, 1]
    assert among(np.array([True, False, True]), known, "layer") == [1, 5]
    assert among(slice(2, None), known, "layer") == [3, 5]
    assert one_among(np.int32(3), known, "layer") == 3
    with pytest.raises(ValueError, match=r"layer 2 is not here; the layers are \[1, 3, 5\]"):
        among([1, 2], known, "layer")
    with pytest.raises(ValueError, match="the truth value True"):
        one_among(True, known, "layer")
