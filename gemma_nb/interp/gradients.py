"""Which tokens a prediction depends on, by gradients."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.executables import pinned
from gemma_nb.indices import number
from gemma_nb.interp.lens import model_of
from gemma_nb.interp.passes import padded_length
from gemma_nb.interp.sizes import check_position
from gemma_nb.interp.trace import Trace
from gemma_nb.nn import Transformer
from gemma_nb.nn.layer_input import Carry, LayerInput
from gemma_nb.typing import EMPTY, Params

if TYPE_CHECKING:
    import xarray


@pinned
def token_attribution(
    trace: Trace,
    target: int | str | None = None,
    *,
    position: int = -1,
    method: Literal["gradient_x_input", "integrated_gradients"] = "gradient_x_input",
    steps: int = 32,
    baseline: int = 0,
) -> xarray.DataArray:
    """How much each token of the text speaks for a prediction.

    "gradient_x_input": g_t . x_t with g_t the gradient of log p(target) by the embedding x_t (Denil
    et al. 2014, arXiv:1412.6815).  "integrated_gradients": (x_t - b) . mean of the gradients along
    the straight line from a text of baseline tokens, each with the embedding b (Sundararajan et al.
    2017, arXiv:1703.01365); the shares add up to log p(target | text) - log p(target | baseline),
    as nearly as `steps` points of a Gauss-Legendre rule integrate.

    What it does not mean: the gradient is of an infinitely small change, and says little where the
    model saturates; the integral depends on the baseline, and passes through mixtures of embeddings
    that are no text.

    Args:
      trace: of any sites.
      target: the predicted token, by id or by a text that is one token; None takes the next token
        of the text, or after the last one the model's first choice.
      position: the position that predicts.
      method: see above.
      steps: points of the integral.
      baseline: id of the token that the baseline text is made of, <pad> by default.

    Returns:
      (position) nats, with zeros behind `position`.

    Raises:
      ValueError: an unknown token, position or method, or a model of another library.
    """
    model, ids = model_of(trace), trace.tokens
    if not isinstance(model.transformer, Transformer):
        raise ValueError("gradients need gnb.nn.Transformer on the same parameters")
    if method not in ("gradient_x_input", "integrated_gradients"):
        raise ValueError(
            f'method must be "gradient_x_input" or "integrated_gradients", got {method!r}'
        )
    query = check_position(position, len(ids))
    if target is None:
        last = query + 1 == len(ids)
        choice = int(np.argmax(trace.get("logits", positions=query).values)) if last else 0
        target = choice if last else int(ids[query + 1])
    target, baseline = map(trace.labels_of.id_of, (target, baseline))

    size = padded_length(query + 1)
    positions = np.full((1, size), EMPTY, np.int32)
    positions[0, : query + 1] = np.arange(query + 1)
    embed = trace.get("embed", positions=range(query + 1)).values
    x = jnp.asarray(np.pad(embed, ((0, size - len(embed)), (0, 0)))[None])
    of = partial(
        _value_and_gradient,
        model.transformer,
        model.params,
        model.interventions,
        jnp.asarray(positions),
        jnp.int32(query),
        jnp.int32(target),
    )
    value, gradient = of(x)
    attrs: dict[str, Any] = {"value": float(value), "baseline": float("nan")}
    if method == "gradient_x_input":
        shares = (gradient * x)[0].sum(axis=-1)
    else:
        base = _embedded(model.transformer, model.params, jnp.full_like(positions, baseline))
        steps = number(steps, "steps")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        total = jnp.zeros_like(x)
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            total += np.float32(weight) * of(base + np.float32(node) * (x - base))[1]
        shares = (total * (x - base))[0].sum(axis=-1)
        attrs["baseline"] = float(of(base)[0])
    found = np.zeros(len(ids), np.float32)
    found[: query + 1] = np.asarray(shares)[: query + 1]
    attrs |= {"method": method, "query": query, "target_id": target, "units": "nats"}
    attrs["target"] = trace.labels_of.piece(target)
    return trace.labels_of.array(found, ("position",), "attribution", attrs)


def _encode(module: Any, tokens: jax.Array) -> jax.Array:
    return module.embedder.encode(tokens).astype(jnp.float32)


# Static: the module.
@jax.jit(static_argnums=0)
def _embedded(transformer: Transformer, params: Params, tokens: jax.Array) -> jax.Array:
    return cast(jax.Array, transformer.apply({"params": params}, tokens, method=_encode))


def _from_embeddings(
    module: Any, x: jax.Array, positions: jax.Array, interventions: Any, query: jax.Array
) -> jax.Array:
    """(V,) logits after one position, of a text given as its embeddings."""

    carry = Carry(x)
    for i, block in enumerate(module.blocks):
        carry, _ = block(carry, LayerInput.of(i, positions, interventions))
    return module.unembed(module.leave(carry, positions, interventions)[0, query])


# Static: the module.  Traced: the text, the position and the target.
@partial(jax.jit, static_argnums=0)
def _value_and_gradient(
    transformer: Transformer,
    params: Params,
    interventions: Any,
    positions: jax.Array,
    query: jax.Array,
    target: jax.Array,
    x: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    def logprob(x: jax.Array) -> jax.Array:
        logits = transformer.apply(
            {"params": params},
            x.astype(transformer.dtype),
            positions,
            interventions,
            query,
            method=_from_embeddings,
        )
        return jax.nn.log_softmax(cast(jax.Array, logits))[target]

    return jax.value_and_grad(logprob)(x)
