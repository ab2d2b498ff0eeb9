"""Direct logit attribution: exact shares of components, heads and source tokens in a logit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.executables import pinned
from gemma_nb.indices import Indices
from gemma_nb.interp.lens import model_of
from gemma_nb.interp.sizes import check_position
from gemma_nb.interp.trace import Trace
from gemma_nb.interventions.base import sites_of
from gemma_nb.interventions.numbers import room
from gemma_nb.model import GemmaTransformer
from gemma_nb.sites import check_heads, check_layers

if TYPE_CHECKING:
    import xarray


@pinned
def direct_logit_attribution(
    trace: Trace,
    token: int | str,
    *,
    by: Literal["component", "head", "token"] = "component",
    position: int | None = None,
    against: int | str | None = None,
) -> xarray.DataArray:
    """Shares of the parts of the model in the logit of `token`.

    The last residual is a sum: embedding + attention outputs + feed-forward outputs.  With the
    final norm's divisor frozen at what it was, the logit is linear in it, and each term c has a
    share

        logit(c) = c / rms * (1 + scale) . W_E[token]

    and the shares add up to the logit (before the soft-cap, where the model has one).  A head's
    share goes through the layer's post-norm, frozen likewise.  What interventions change between
    these parts (the residual stream, a head's output behind its values) is one more component,
    "interventions".  Source: Elhage et al. 2021, "A mathematical framework for transformer
    circuits"; the name from Nanda's TransformerLens.

    What it does not mean: only the direct path to the logits is counted.  What a component does
    through later ones is in their shares, and a part of a share may be the same for all tokens:
    look at differences (`against`).

    Args:
      trace: of any sites.
      token: its id, or a text that is one token, such as " Paris".
      by: "component": embedding, each layer's attention and feed-forward.  "head": with each head
        of its own.  "token": the heads' shares split over the source positions whose values they
        read, for the prediction at one `position`.
      position: for `by="token"`, the position that predicts; None is the last one.
      against: a second token, whose shares are subtracted.

    Returns:
      (component, position).  For "component" and "head", the prediction after each position; for
      "token", the source positions of the one prediction.

    Raises:
      ValueError: an unknown token or position, or a trace without its model.
    """
    model = model_of(trace)
    if by not in ("component", "head", "token"):
        raise ValueError(f'by must be "component", "head" or "token", got {by!r}')
    if by != "token" and position is not None:
        raise ValueError(
            f'position= is for by="token"; by="{by}" has all positions: take one with '
            ".sel(position=...)"
        )
    token = trace.labels_of.id_of(token)
    against = None if against is None else trace.labels_of.id_of(against)
    table = model.params["embedder"]["input_embedding"]
    head = np.asarray(table[token], np.float32)
    if against is not None:
        head = head - np.asarray(table[against], np.float32)

    query = None
    if by == "token":
        query = check_position(-1 if position is None else position, len(trace.tokens))
    shares = _Shares(trace, model, head, query)
    names, rows = shares.rows(by)
    layers, kinds, heads = zip(*names, strict=True)
    labels = {"attn": "L{}.attn", "mlp": "L{}.mlp", "head": "L{}.H{}"}
    array = trace.labels_of.array(
        np.stack(rows).astype(np.float32),
        ("component", "position"),
        "logit",
        {
            "token": trace.labels_of.piece(token),
            "token_id": token,
            "against": "" if against is None else trace.labels_of.piece(against),
            "against_id": -1 if against is None else against,
            "units": "logits",
            "by": by,
        },
    )
    array = array.assign_coords(
        component=[labels.get(kind, kind).format(i, n) for i, kind, n in names],
        component_layer=("component", list(layers)),
        component_kind=("component", list(kinds)),
        component_head=("component", list(heads)),
    )
    return array if query is None else array.assign_coords(query=query)


# Where an intervention adds something to the logit that no component of a kind has.
_BETWEEN = ("residual_pre", "residual_mid", "residual", "final")
_BETWEEN_PARTS = {
    "component": _BETWEEN,
    "head": (*_BETWEEN, "attn_raw", "attn_out"),
    "token": (*_BETWEEN, "attn_raw", "attn_out", "z"),
}


class _Shares:
    """The terms of the last residual along one direction, divided by the final norm."""

    def __init__(
        self, trace: Trace, model: GemmaTransformer, head: np.ndarray, query: int | None
    ) -> None:
        self.trace, self.model, self.head, self.query = trace, model, head, query
        self.direction = head * (1 + np.asarray(model.params["final_norm"]["scale"], np.float32))
        self.at = None if query is None else [query]
        self.rms = trace.get("final_rms", positions=self.at).values

    def rows(self, by: str) -> tuple[list[tuple[int, str, int]], list[np.ndarray]]:
        """[(layer, kind, head)], and for each (T,) shares."""
        names, rows = [(-1, "embed", -1)], [self._plain("embed", None)]
        for i in range(self.trace.config.num_layers):
            if by == "component":
                names.append((i, "attn", -1))
                rows.append(self._plain("attn_out", i))
            else:
                heads = self._by_token(i) if by == "token" else self._by_head(i)
                names += [(i, "head", n) for n in range(len(heads))]
                rows += list(heads)
            names.append((i, "mlp", -1))
            rows.append(self._plain("mlp_out", i))
        given = self.model.interventions
        edited = {name for item in given.items for name in sites_of(item)} if given else set()
        if edited.intersection(_BETWEEN_PARTS[by]):
            logit = self.trace.get("final", positions=self.at).values @ self.head
            rest = logit - np.sum(rows, axis=0 if self.query is None else None)
            names.append((-1, "interventions", -1))
            rows.append(rest if self.query is None else self._at_query(rest))
        return names, rows

    def _at_query(self, share: np.ndarray) -> np.ndarray:
        """(T,) with the one number where the prediction is made."""
        row = np.zeros(len(self.trace.tokens), np.float32)
        row[self.query] = share[0]
        return row

    def _plain(self, site: str, layer: int | None) -> np.ndarray:
        value = self.trace.get(site, layer, self.at).values
        share = (value if layer is None else value[0]) @ self.direction / self.rms
        return share if self.query is None else self._at_query(share)

    def _read_out(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(N, H) what a head's z is multiplied with, and (T,) what its share is divided by."""
        params, divisor = self.model.params[f"layer_{layer}"], self.rms
        direction = self.direction
        if self.trace.config.use_post_attn_norm:
            scale = np.asarray(params["post_attention_norm"]["scale"], np.float32)
            direction = direction * (1 + scale)
            divisor = divisor * self.trace.get("post_attention_rms", layer, self.at).values[0]
        w = np.asarray(params["attn"]["attn_vec_einsum"]["w"], np.float32)
        return w @ direction, divisor

    def _by_head(self, layer: int) -> np.ndarray:
        """(N, T)."""
        read_out, divisor = self._read_out(layer)
        z = self.trace.get("z", layer).values[0]
        return np.einsum("TNH,NH->NT", z, read_out) / divisor

    def _by_token(self, layer: int) -> np.ndarray:
        """(N, S)."""
        read_out, divisor = self._read_out(layer)
        weights = self.trace.get("attention", layer, self.at).values[0][:, 0]  # (N, S)
        values = _values_by_head(self.trace, layer)
        return weights * np.einsum("SNH,NH->NS", values, read_out) / divisor[0]


def _values_by_head(trace: Trace, layer: int) -> np.ndarray:
    """(S, N, H): the values that each query head reads."""
    sizes = trace.config.axis_sizes(layer)
    group = np.arange(sizes["N"]) * sizes["K"] // sizes["N"]
    return trace.get("v", layer).values[0][:, group]


def attention_rollout(trace: Trace, *, residual: float = 0.5) -> xarray.DataArray:
    """Attention multiplied through the layers: which tokens a state is made of, roughly.

        R_l = ((1 - residual) mean_heads(A_l) + residual I) R_(l-1)

    Source: Abnar and Zuidema 2020, "Quantifying attention flow in transformers", arXiv:2005.00928.

    What it does not mean: values, feed-forward layers and norms are left out and heads count alike,
    so it says where information could flow, not what was used.

    Args:
      trace: of any sites.
      residual: the weight of the residual stream beside attention.

    Returns:
      (layer, query, key), rows sum to one.
    """
    if not 0 <= residual <= 1:
        raise ValueError(f"residual must lie in 0 to 1, got {residual}")
    count, found = len(trace.tokens), []
    rollout = np.eye(count, dtype=np.float32)
    for i in range(trace.config.num_layers):
        mean = trace.get("attention", i).values[0].mean(axis=0)
        rollout = (1 - residual) * mean @ rollout + residual * rollout
        found.append(rollout)
    return trace.labels_of.array(
        np.stack(found), ("layer", "query", "key"), "attention_rollout", {"residual": residual}
    )


@pinned
def value_weighted_attention(
    trace: Trace, layers: Indices = None, heads: Indices = None
) -> xarray.DataArray:
    """Attention weights times the size of what is moved: ||a_qs v_s W_O||.

    A weight on a key whose value is next to nothing (as of <bos>, often) moves nothing.  Source:
    Kobayashi et al. 2020, "Attention is not only a weight", arXiv:2004.10102.

    What it does not mean: sizes of vectors that may cancel each other; before any post-norm.

    Args:
      trace: of any sites.
      layers: which; None for all.
      heads: which; None for all.

    Returns:
      (layer, head, query, key), not normalised.
    """
    model, config = model_of(trace), trace.config
    chosen = check_layers(layers, config.num_layers)
    some = check_heads(heads, config.num_heads)
    weights = trace.get("attention", chosen, heads=some)
    found = np.empty(weights.shape, np.float32)
    for row, i in enumerate(chosen):
        w = model.params[f"layer_{i}"]["attn"]["attn_vec_einsum"]["w"]
        values = _values_by_head(trace, i)
        # Of all heads, and of few counts of positions: each is compiled.
        padded = np.pad(values, ((0, room(len(values)) - len(values)), (0, 0), (0, 0)))
        norms = np.asarray(_norms(padded, w))[: len(values), list(some)]
        found[row] = weights.values[row] * norms.T[:, None]
    return trace.labels_of.array(
        found,
        ("layer", "head", "query", "key"),
        "value_weighted_attention",
        layers=chosen,
        heads=some,
    )


@jax.jit
def _norms(values: jax.Array, w: jax.Array) -> jax.Array:
    """(S, N) of values (S, N, H) through w (N, H, D)."""
    return jnp.linalg.norm(jnp.einsum("SNH,NHD->SND", values, w.astype(jnp.float32)), axis=-1)
