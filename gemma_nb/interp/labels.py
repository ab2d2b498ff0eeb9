"""Names and coordinates of what was captured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_nb.config import TransformerConfig
from gemma_nb.indices import number
from gemma_nb.sites import Site
from gemma_nb.summaries import summary

if TYPE_CHECKING:
    import xarray

    from gemma_nb.text.tokenizer import Tokenizer

# How an axis of a site is called in a labelled array.  A site that has both T and S is a map from
# queries to keys; elsewhere T is simply the position.
AXIS_NAMES: Mapping[str, str] = {
    "N": "head",
    "K": "kv_head",
    "H": "head_dim",
    "D": "embedding",
    "F": "feed_forward",
    "S": "key",
    "V": "vocabulary",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """Whose positions they are.

    Attributes:
      config: of the model.
      ids: (T,) int32 token ids.
      tokens: T strings, what each token stands for.
      turns: (T,) index of the conversation's turn that each token belongs to, -1 for none; None
        for a text that is no conversation.
      roles: T names: "system", "user", "model" or "template"; None as `turns`.
      attrs: what every array carries: "model", and "interventions", one on a line.
      tokenizer: names tokens that are not in the text; None where there is none.
    """

    config: TransformerConfig
    ids: np.ndarray
    tokens: tuple[str, ...]
    turns: np.ndarray | None = None
    roles: tuple[str, ...] | None = None
    attrs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    __repr__ = summary

    def piece(self, token: int) -> str:
        """Text of a token id, or without a tokenizer its number."""
        known = self.tokenizer is not None and 0 <= token < self.tokenizer.vocab_size
        return self.tokenizer.token_text(token) if known and self.tokenizer else str(token)

    def id_of(self, token: Any) -> int:
        """The id of a token that is given by its id, or by a text that is one token (" Paris").

        Raises:
          ValueError: an id outside the vocabulary, a text of several tokens or of none, or a text
            without a tokenizer.
        """
        if isinstance(token, str):
            if self.tokenizer is None:
                raise ValueError(f"{token!r} needs a tokenizer; or pass the token's id")
            ids = self.tokenizer.encode(token)
            if len(ids) != 1:
                pieces = ", ".join(repr(self.piece(i)) for i in ids)
                raise ValueError(
                    f"{token!r} is {len(ids)} tokens ({pieces}): name one, with the space that "
                    "belongs to it"
                )
            (token,) = ids
        token = number(token, "token", "token")
        if not 0 <= token < self.config.num_embed:
            raise ValueError(f"token ids must lie in 0 to {self.config.num_embed - 1}, got {token}")
        return token

    def coords(
        self,
        dims: Sequence[str],
        *,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Coordinates for those of `dims` that have some.

        Args:
          dims: names of axes.
          layers: which layers the axis "layer" holds; None for all, as below.
          positions: which positions "position" or "query" holds; "key" always holds all.
          heads: which query heads "head" holds, or "kv_head" key-value heads.
        """
        c, found = self.config, dict[str, Any]()
        if "layer" in dims:
            chosen = list(range(c.num_layers) if layers is None else layers)
            kinds = [c.layers[i].kind.label if i >= 0 else "embedding" for i in chosen]
            found |= {"layer": chosen, "layer_kind": ("layer", kinds)}
        for dim in ("position", "query", "key"):
            if dim in dims:
                every = dim == "key" or positions is None
                found |= self._positions(dim, range(len(self.ids)) if every else positions)
        if "head" in dims:
            which = np.arange(c.num_heads) if heads is None else np.asarray(heads)
            found["head"] = which
            counts = {c.axis_sizes(i)["K"] for i in layers or range(c.num_layers) if i >= 0}
            # Heads of layers that differ in K are grouped differently in each.
            if len(counts) == 1:
                found["kv_group"] = ("head", which * counts.pop() // c.num_heads)
        if "kv_head" in dims:
            count = c.shared_size("K", layers)
            found["kv_head"] = np.arange(count) if heads is None else np.asarray(heads)
        return found

    def _positions(self, dim: str, positions: Any) -> dict[str, Any]:
        at = list(positions)
        prefix = "" if dim == "position" else f"{dim}_"
        found: dict[str, Any] = {
            dim: np.asarray(at, np.int64),
            f"{prefix}token": (dim, [self.tokens[i] for i in at]),
            f"{prefix}token_id": (dim, self.ids[at]),
        }
        if self.turns is not None and self.roles is not None:
            found[f"{prefix}turn"] = (dim, self.turns[at])
            found[f"{prefix}role"] = (dim, [self.roles[i] for i in at])
        return found

    def array(
        self, values: np.ndarray, dims: Sequence[str], name: str, attrs: Any = (), **chosen: Any
    ) -> xarray.DataArray:
        """A labelled array; `chosen` as of `coords`."""
        import xarray

        return xarray.DataArray(
            values,
            dims=list(dims),
            coords=self.coords(dims, **chosen),
            name=name,
            attrs={**self.attrs, **dict(attrs)},
        )

    def dataset(
        self, data: Mapping[str, tuple[Sequence[str], Any]], attrs: Any = (), **chosen: Any
    ) -> xarray.Dataset:
        """Several of them: name -> (dims, values).

        Where "token" is a variable, the text's own tokens are the coordinate "input_token".
        """
        import xarray

        dims = list(dict.fromkeys(dim for names, _ in data.values() for dim in names))
        coords = self.coords(dims, **chosen)
        for name in [name for name in coords if name in data]:
            coords[f"input_{name}"] = coords.pop(name)
        return xarray.Dataset(
            {name: (list(names), values) for name, (names, values) in data.items()},
            coords=coords,
            attrs={**self.attrs, **dict(attrs)},
        )


def dims_of(site: Site) -> list[str]:
    """Names of the axes of a site's labelled array."""
    if site.is_map:
        return ["layer", "head", "query", "key"]
    names = ["position" if axis == "T" else AXIS_NAMES[axis] for axis in site.dims[1:]]
    return ["layer", *names] if site.per_layer else names
