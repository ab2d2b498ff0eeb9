"""Where a forward pass can be observed: capture-site names, their axes, and what they hold.

Every site is sown into the linen collection `intermediates` on each forward pass.  That is free
unless the caller makes the collection mutable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gemma_nb.config import TransformerConfig
    from gemma_nb.model import GemmaTransformer


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in the forward pass.

    Attributes:
      name: what to ask for.
      dims: axes of one layer's value, in the letters of `gemma_nb.typing`.
      scope: "attn", "mlp" and "block" sites exist once per layer, "model" sites once.
      holds: what the value is.
    """

    name: str
    dims: tuple[str, ...]
    scope: Literal["attn", "mlp", "block", "model"]
    holds: str

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return self.scope != "model"


_ALL = (
    Site("embed", ("B", "T", "D"), "model", "token embeddings times sqrt(D), the first residual"),
    Site("q", ("B", "T", "N", "H"), "attn", "queries, normalised, rotated and scaled"),
    Site("k", ("B", "T", "K", "H"), "attn", "new keys, normalised and rotated"),
    Site("v", ("B", "T", "K", "H"), "attn", "new values"),
    Site("attention", ("B", "T", "N", "S"), "attn", "attention weights after the softmax"),
    Site("z", ("B", "T", "N", "H"), "attn", "attention-weighted values, per head"),
    Site("attn_out", ("B", "T", "D"), "block", "what attention adds to the residual stream"),
    Site("residual_mid", ("B", "T", "D"), "block", "the residual stream after attention"),
    Site("mlp_hidden", ("B", "T", "F"), "mlp", "feed-forward activations, gelu(gate) * up"),
    Site("mlp_out", ("B", "T", "D"), "block", "what the feed-forward adds to the residual stream"),
    Site("residual", ("B", "T", "D"), "block", "the residual stream after the layer"),
    Site("final", ("B", "T", "D"), "model", "the last residual after the final norm"),
)
SITES: dict[str, Site] = {site.name: site for site in _ALL}


def site(name: str) -> Site:
    """The site called `name`.

    Raises:
      ValueError: no such site; the message lists the known ones.
    """
    if name not in SITES:
        raise ValueError(f"unknown capture site {name!r}; the sites are {', '.join(SITES)}")
    return SITES[name]


def check_layers(layers: Iterable[int] | int | None, num_layers: int) -> tuple[int, ...]:
    """`layers` as ascending indices into a model of `num_layers`; None means all.

    Negative indices count from the last layer.

    Raises:
      ValueError: an index out of range; the message gives the range.
    """
    if layers is None:
        return tuple(range(num_layers))
    wanted = [layers] if isinstance(layers, int) else list(layers)
    resolved = set()
    for index in wanted:
        if not -num_layers <= index < num_layers:
            raise ValueError(
                f"layer {index} does not exist: the model has layers 0 to {num_layers - 1}"
            )
        resolved.add(index % num_layers)
    if not resolved:
        raise ValueError("layers is empty: name at least one layer, or pass None for all")
    return tuple(sorted(resolved))


def list_sites(model: GemmaTransformer | TransformerConfig) -> list[Site]:
    """Every capture site that `model` has.

    Gemma 1, 2 and 3 have the same sites, so this depends on the model only once other
    architectures join; pass it anyway, so that code keeps working then.
    """
    del model
    return list(_ALL)
