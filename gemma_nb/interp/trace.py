"""What a forward pass computed, as labelled arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.config import TransformerConfig
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn import Transformer
from gemma_nb.sites import SITES, Site, check_layers, site
from gemma_nb.text.tokenizer import Tokenizer
from gemma_nb.typing import EMPTY, Params

if TYPE_CHECKING:
    import xarray

# Texts are padded to one of these lengths, so that a growing conversation seldom recompiles.
_LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768)
# A request beyond this is refused before it is computed.
_LIMIT_BYTES = 4 * 2**30

# How an axis of a site is called in a labelled array.  A site that has both T and S is a map from
# queries to keys; elsewhere T is simply the position.
_AXIS_NAMES = {
    "N": "head",
    "K": "kv_head",
    "H": "head_dim",
    "D": "embedding",
    "F": "feed_forward",
    "S": "key",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """What one forward pass over a text computed.

    Attributes:
      tokens: (T,) int32 token ids.
      labels: T strings, what each token stands for.
      config: of the model.
      data: site name -> labelled float32 array.
    """

    tokens: np.ndarray
    labels: tuple[str, ...]
    config: TransformerConfig
    data: dict[str, xarray.DataArray]

    def __getattr__(self, name: str) -> xarray.DataArray:
        # Dunder look-ups (copy, pickle) come before `data` exists.
        if name in SITES and "data" in self.__dict__:
            if name in self.data:
                return self.data[name]
            have = ", ".join(self.data)
            raise AttributeError(
                f"this trace holds {have}; trace again with sites=(..., {name!r}) to have {name}"
            )
        raise AttributeError(f"Trace has no attribute {name!r}")

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {dict(x.sizes)}" for name, x in self.data.items())
        return f"<Trace of {len(self.tokens)} tokens: {shapes}>"


def trace(
    model: GemmaTransformer,
    tokens_or_text: str | Sequence[int] | np.ndarray,
    *,
    tokenizer: Tokenizer | None = None,
    sites: Sequence[str] | str = ("attention",),
    layers: Iterable[int] | int | None = None,
) -> Trace:
    """Runs a text through the model and keeps what the `sites` saw.

    The pass is the plain linen module in the precision of the model's parameters; only the sites
    and layers asked for are ever materialised.

    Args:
      model: what computes.
      tokens_or_text: token ids, or a text (then with a tokenizer; <bos> is put in front).
      tokenizer: for texts, and for the token labels; without it tokens are labelled by their ids.
      sites: see `gnb.list_sites`.
      layers: which layers; None for all.

    Returns:
      A `Trace`.  `trace.attention` is (layer, head, query, key); per-position sites are
      (layer, position, ...).  Coordinates carry token strings and layer kinds.

    Raises:
      ValueError: an unknown site or layer, an empty text, ids outside the vocabulary, or a request
        larger than the limit; the message says what to ask for instead.
    """
    wanted = tuple(site(name) for name in ([sites] if isinstance(sites, str) else sites))
    if not wanted:
        raise ValueError(f"sites is empty: name at least one of {', '.join(SITES)}")
    chosen = check_layers(layers, model.config.num_layers)
    ids = _token_ids(model, tokens_or_text, tokenizer)
    _refuse_too_large(wanted, chosen, len(ids), model.config)

    padded = np.zeros((1, _padded_length(len(ids))), np.int32)
    positions = np.full_like(padded, EMPTY)
    padded[0, : len(ids)] = ids
    positions[0, : len(ids)] = np.arange(len(ids))
    values = _capture(model.transformer, wanted, chosen, model.params, padded, positions)

    labels = tuple(tokenizer.token_text(i) if tokenizer else str(i) for i in ids.tolist())
    data = {
        s.name: _labelled(s, np.asarray(values[s.name]), chosen, labels, model.config)
        for s in wanted
    }
    return Trace(tokens=ids, labels=labels, config=model.config, data=data)


# Static: the module, and what is captured, since both decide what is computed at all.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _capture(
    transformer: Transformer,
    wanted: tuple[Site, ...],
    layers: tuple[int, ...],
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
) -> dict[str, jax.Array]:
    """Site name -> (layers, T, ...) or (T, ...); attention as (layers, N, T, S)."""
    _, state = transformer.apply(
        {"params": params}, tokens, positions=positions, mutable=["intermediates"]
    )
    sown: Any = state["intermediates"]

    def value(s: Site, layer: int) -> jax.Array:
        array = s.value(sown, layer)[0]
        # The model keeps queries in front; a map is read head by head.
        return array.transpose(1, 0, 2) if s.name == "attention" else array

    def stacked(s: Site) -> jax.Array:
        if not s.per_layer:
            return s.value(sown)[0]
        return jnp.stack([value(s, layer) for layer in layers])

    return {s.name: stacked(s).astype(jnp.float32) for s in wanted}


def _token_ids(model: GemmaTransformer, given: Any, tokenizer: Tokenizer | None) -> np.ndarray:
    if isinstance(given, str):
        if tokenizer is None:
            raise ValueError("a text needs tokenizer=...; or pass token ids")
        given = tokenizer.encode(given, bos=True)
    ids = np.asarray(given)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError(f"expected a text or a non-empty list of token ids, got {given!r:.80}")
    if ids.min() < 0 or ids.max() >= model.config.num_embed:
        raise ValueError(
            f"token ids must lie in 0 to {model.config.num_embed - 1}, "
            f"got {ids.min()} to {ids.max()}"
        )
    return ids.astype(np.int32)


def _padded_length(length: int) -> int:
    return next((n for n in _LENGTHS if n >= length), -(-length // 512) * 512)


def _sizes(s: Site, length: int, config: TransformerConfig) -> list[int]:
    c = config
    sizes = {"T": length, "S": length, "N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim}
    sizes |= {"D": c.embed_dim, "F": c.hidden_dim}
    return [sizes[axis] for axis in s.dims[1:]]


def _refuse_too_large(
    wanted: Sequence[Site], layers: Sequence[int], length: int, config: TransformerConfig
) -> None:
    padded = _padded_length(length)
    one_layer = sum(4 * int(np.prod(_sizes(s, padded, config))) for s in wanted)
    total = one_layer * len(layers)
    if total > _LIMIT_BYTES:
        fit = max(_LIMIT_BYTES // one_layer, 1)
        raise ValueError(
            f"{', '.join(s.name for s in wanted)} of {length} tokens in {len(layers)} layers would "
            f"take {total / 2**30:.1f} GiB, and the limit is {_LIMIT_BYTES / 2**30:.0f} GiB: pass "
            f"layers=[...] with at most {fit} of them, or a shorter text"
        )


def _labelled(
    s: Site,
    values: np.ndarray,
    layers: Sequence[int],
    labels: Sequence[str],
    config: TransformerConfig,
) -> xarray.DataArray:
    import xarray

    length = len(labels)
    if s.name == "attention":
        dims = ["layer", "head", "query", "key"]
        values = values[..., :length, :length]
    else:
        names = ["position" if axis == "T" else _AXIS_NAMES[axis] for axis in s.dims[1:]]
        dims = ["layer", *names] if s.per_layer else names
        values = np.take(values, np.arange(length), axis=dims.index("position"))

    coords: dict[str, Any] = {}
    if s.per_layer:
        coords["layer"] = list(layers)
        coords["layer_kind"] = ("layer", [config.layers[i].kind.label for i in layers])
    for dim in ("query", "key", "position"):
        if dim in dims:
            coords[dim] = np.arange(length)
            coords["token" if dim == "position" else f"{dim}_token"] = (dim, list(labels))
    if "head" in dims:
        heads = np.arange(config.num_heads)
        coords["head"] = heads
        coords["kv_group"] = ("head", heads * config.num_kv_heads // config.num_heads)
    return xarray.DataArray(values, dims=dims, coords=coords, name=s.name, attrs={"site": s.holds})
