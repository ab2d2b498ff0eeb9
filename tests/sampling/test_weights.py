"""What a step of a single token is given stands for the same weights, in fewer arrays."""

import flax
import jax
import numpy as np
import pytest

from gemma_nb.cpu.storage import Int8Rows, Stored
from gemma_nb.sampling.weights import decoding_weights


def flat(tree):
    return flax.traverse_util.flatten_dict(dict(tree))


@pytest.mark.parametrize("storage", ["exact", "int8"])
def test_a_single_token_is_given_the_same_weights_in_fewer_arrays(tiny_model, storage):
    weights = decoding_weights(tiny_model[0].replace(storage=storage))
    single = weights.for_one_token()
    wanted, given = weights.variables, single.variables
    assert flat(given["params"]).keys() == flat(wanted["params"]).keys()
    for path, leaf in flat(wanted["params"]).items():
        np.testing.assert_array_equal(flat(given["params"])[path], leaf)
    prepared = flat(given["prepared"])
    assert prepared.keys() == flat(wanted["prepared"]).keys()
    scales, copies = [], 0
    for path, stored in flat(wanted["prepared"]).items():
        bare = Stored(stored.one)
        assert jax.tree.structure(prepared[path]) == jax.tree.structure(bare), path
        for one, other in zip(*map(jax.tree.leaves, (prepared[path], bare)), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        if isinstance(stored.one, Int8Rows):
            scales += [stored.one.scale, stored.one.inputs]
        copies += len(jax.tree.leaves(stored)) - len(jax.tree.leaves(bare))
    assert bool(scales) == (storage == "int8")
    # One array for each width, in place of all of them.
    fewer = len(scales) - len({len(scale) for scale in scales})
    arrays = len(jax.tree.leaves(single))
    assert arrays == len(jax.tree.leaves(weights)) - copies - fewer
