"""Interventions inside of JAX's transformations: values are traced, places are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb


def test_what_is_optimised_is_traced(case):
    """Steps that are compiled equal those in Python: gradients, patched values, scales, batches."""
    model, ids = case

    def loss(vector, scale):
        under = model.intervene(
            gnb.Steer(2, vector, scale),
            gnb.Patch("residual", 3, [5, 6], vector),
            gnb.ScaleHeads({1: {0: scale}}),
            gnb.EditNeuron(1, 3, scale),
        )
        assert "traced float32 (64,)" in str(under.interventions) or not isinstance(
            vector, jax.core.Tracer
        )
        given = {"params": under.params}
        output = under.transformer.apply(
            given, jnp.asarray(ids)[None], interventions=under.interventions
        )
        return -jax.nn.log_softmax(output.logits[0, -1])[5]

    vector, scale = np.linspace(-1, 1, 64, dtype=np.float32), np.float32(0.5)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(vector, scale)
    step = 1e-2
    moved = loss(vector, scale + step), loss(vector, scale - step)
    np.testing.assert_allclose(gradients[1], (moved[0] - moved[1]) / (2 * step), rtol=2e-2)
    assert np.abs(gradients[0]).max() > 0
    several = jax.jit(jax.vmap(loss, in_axes=(0, None)))(np.stack([vector, -vector]), scale)
    np.testing.assert_allclose(several, [loss(vector, scale), loss(-vector, scale)], atol=2e-5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda i: gnb.Steer(i, np.ones(64)), "layer"),
        (lambda i: gnb.KnockOut(1, queries=i), "positions"),
        (lambda i: gnb.KnockOut(1, keys=slice(0, i)), "positions"),
        (lambda i: gnb.KnockOut(1, [i]), "heads"),
        (lambda i: gnb.AblateHeads({1: [i]}), "heads"),
        (lambda i: gnb.AblateMLP([i]), "layers"),
        (lambda i: gnb.EditNeuron(1, i, 2.0), "neuron"),
    ],
)
def test_where_an_intervention_acts_is_not_traced(case, make, name):
    with pytest.raises(ValueError, match=f"{name} is traced by jax.jit"):
        jax.jit(lambda i: case[0].intervene(make(i)).params)(3)
