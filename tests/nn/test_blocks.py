"""Sums taken block by block, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb.nn.blocks import takes_blocks, times_in_blocks
from gemma_nb.nn.linear import Einsum

INNER, OUT = 2048, 48


@pytest.fixture(scope="module")
def factors():
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (600, INNER)), jax.random.normal(keys[1], (INNER, OUT))


def error(product, x, y):
    expected = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    return np.linalg.norm(product - expected) / np.linalg.norm(expected)


@pytest.mark.optimized
def test_they_lose_less(factors):
    """numpy's own sums lose 3e-7, those of XLA:CPU 8e-7."""
    found = jax.jit(times_in_blocks)(*factors)
    assert error(found, *factors) < 3e-7
    assert error(found, *factors) < 0.7 * error(jax.jit(jnp.matmul)(*factors), *factors)


def test_leading_axes_are_kept(factors):
    x, y = factors
    found = times_in_blocks(x.reshape(3, 200, INNER), y)
    np.testing.assert_array_equal(found.reshape(600, OUT), times_in_blocks(x, y))


def test_gradients_are_those_of_the_product(factors):
    def loss(times, x, y):
        return jnp.sum(jnp.sin(times(x, y) / 50))

    for which in (0, 1, (0, 1)):
        found, expected = (
            jax.tree.leaves(
                jax.grad(loss, argnums=jax.tree.map(lambda i: i + 1, which))(f, *factors)
            )
            for f in (times_in_blocks, jnp.matmul)
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    _, tangent = jax.jvp(times_in_blocks, factors, factors)
    np.testing.assert_allclose(tangent, 2 * jnp.matmul(*factors), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype", "inner", "taken"),
    [
        ((1, 600, 1024), "float32", 1024, True),
        ((2, 300, 4, 256), "float32", 1024, True),
        ((1, 256, 1024), "float32", 1024, False),  # would take a quarter longer
        ((1, 600, 1024), "bfloat16", 1024, False),
        ((1, 600, 128), "float32", 128, False),  # is one block
        ((1, 600, 1000), "float32", 1000, False),  # is no number of blocks
    ],
)
def test_where_blocks_are_taken(shape, dtype, inner, taken):
    assert takes_blocks(jnp.zeros(shape, dtype), inner) is taken


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("eqn", "shape", "x"),
    [
        ("...D,NDH->...NH", (2, 640, 32), (2, 300, 640)),
        ("...D,CFD->...CF", (2, 24, 640), (600, 640)),
        ("...NH,NHD->...D", (4, 256, 48), (1, 600, 4, 256)),
    ],
)
def test_linear_maps_take_them(eqn, shape, x, dtype):
    """In every order of a weight's axes, and whatever its dtype."""
    keys = jax.random.split(jax.random.key(1))
    x, w = jax.random.normal(keys[0], x), jax.random.normal(keys[1], shape).astype(dtype)
    found = jax.jit(Einsum(eqn, shape).apply)({"params": {"w": w}}, x)
    expected = np.einsum(eqn, np.asarray(x, np.float64), np.asarray(w, np.float64))
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 3e-7
