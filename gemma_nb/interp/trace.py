"""Traces: what a forward pass computed, as labelled arrays."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_nb.config import Sliding, TransformerConfig
from gemma_nb.executables import pinned
from gemma_nb.expected import a, expect, token_array
from gemma_nb.indices import Indices
from gemma_nb.interp import store
from gemma_nb.interp.display import Facts, pictures
from gemma_nb.interp.labels import Labels, dims_of
from gemma_nb.interp.passes import Pass
from gemma_nb.interp.pieces import Selection
from gemma_nb.interp.sizes import Chosen, refuse_too_large
from gemma_nb.interventions.base import lines_of
from gemma_nb.interventions.reach import warn_of_unreached
from gemma_nb.model import GemmaTransformer
from gemma_nb.sites import SITES, Site, canonical, check_layer, site_of
from gemma_nb.structure import draw
from gemma_nb.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xarray
    from treescope import renderers, rendering_parts


@dataclasses.dataclass(eq=False)
class Trace:
    """A forward pass over a text, as labelled arrays of its capture sites.

    `trace.attention`, `trace.residual`, ... is what was asked for at `gnb.trace`; a site that was
    not is computed when it is looked at, from the residual stream that the trace keeps, and kept.
    The field's other words are as good: `trace.pattern`, `trace.resid_pre`, `trace.resid_post`.
    `get` computes a part without keeping it.

    Attributes:
      labels_of: tokens, turns, configuration and what arrays are labelled with.
      data: site name -> labelled array, what is held.
      source: recomputes what is not held; None in a trace that was loaded from a file.
    """

    labels_of: Labels
    data: dict[str, xarray.DataArray]
    source: Pass | None = None

    @property
    def tokens(self) -> np.ndarray:
        """(T,) int32 token ids."""
        return self.labels_of.ids

    @property
    def token_ids(self) -> np.ndarray:
        """(T,) int32, as `tokens`."""
        return self.tokens

    @property
    def labels(self) -> tuple[str, ...]:
        """T strings, what each token stands for."""
        return self.labels_of.tokens

    @property
    def config(self) -> TransformerConfig:
        """Configuration of the model."""
        return self.labels_of.config

    @property
    def turns(self) -> np.ndarray | None:
        """(T,) index of each token's turn, -1 for none; None outside of a conversation."""
        return self.labels_of.turns

    @property
    def roles(self) -> tuple[str, ...] | None:
        """T names: "system", "user", "model", "template"; None outside of a conversation."""
        return self.labels_of.roles

    @property
    def interventions(self) -> tuple[str, ...]:
        """Interventions that the trace was computed under, one line for each."""
        return tuple(self.labels_of.attrs["interventions"].splitlines())

    @property
    def model_title(self) -> str:
        """Title of the model that computed the trace."""
        return str(self.labels_of.attrs["model"])

    def window(self, layer: int) -> int | None:
        """Number of positions that a query of this layer sees, with its own; None: all before it.

        Raises:
          ValueError: no such layer.
        """
        kind = self.config.layers[check_layer(layer, self.config.num_layers)].kind
        return kind.window if isinstance(kind, Sliding) else None

    @pinned
    def get(
        self,
        site: str,
        layers: Indices = None,
        positions: Indices = None,
        heads: Indices = None,
        *,
        dtype: str = "float32",
    ) -> xarray.DataArray:
        """A part of a site, computed if it is not held; it keeps all its axes.

        Its layers, positions and heads are in ascending order, each once, in whatever order they
        are asked for: the coordinates say which they are, and `.sel(position=[7, 3])` takes them in
        another.

            trace.get("attention", layers=5, heads=2)       # (1, 1, query, key)
            trace.get("logits", positions=-1)               # (1, vocabulary)

        Args:
          site: see `gnb.list_sites`; an alias ("pattern", "resid_post") is as good.
          layers: which; None for all.
          positions: which (queries, on a map); None for all.
          heads: which query heads, or of k, v and what else has these, key-value heads; None for
            all.
          dtype: of the result; "float16" halves it.

        Raises:
          ValueError: an unknown site, layer, position or head; a request beyond the limit, with a
            smaller one; a site that a loaded trace does not hold.
        """
        where = self.source.model if self.source is not None else self.config
        found = site_of(where, site)
        chosen = Chosen.of([found], self.config, len(self.tokens), layers, positions, heads)
        held = self._held(found, chosen)
        if held is not None:
            return held.astype(dtype, copy=False)
        if self.source is None:
            raise ValueError(
                f"this trace was loaded from a file and holds {', '.join(self.data) or 'nothing'} "
                f"only: trace the text again to have {site}"
            )
        refuse_too_large([found], chosen, len(self.tokens), self.config, dtype)
        select = Selection(chosen.positions, chosen.heads, dtype)
        values = self.source.capture([found], chosen.layers, select)
        return self._labelled(found, values[found.name], chosen)

    def __getitem__(self, site: str) -> xarray.DataArray:
        """All of a site, held from now on; raises as `get` does."""
        name = canonical(site)
        if name not in self.data:
            self.data[name] = self.get(name)
        return self.data[name]

    def __getattr__(self, name: str) -> xarray.DataArray:
        # Dunder look-ups (copy, pickle) come before `data` exists.
        if canonical(name) not in SITES or "data" not in self.__dict__:
            raise AttributeError(f"Trace has no attribute {name!r}")
        try:
            return self[name]
        except ValueError as error:  # so that hasattr() and notebooks' completion work
            raise AttributeError(str(error)) from error

    def to_dataset(self) -> xarray.Dataset:
        """Dataset of all sites that are held, which is what `save` writes."""
        return store.to_dataset(self.labels_of, self.data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what is held as netCDF (".nc") or Zarr (".zarr", with the zarr library).

        Raises:
          ValueError: another ending.
          ImportError: Zarr without the zarr library.
        """
        store.save(self.to_dataset(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """A trace that `save` wrote; it holds what was saved and computes nothing more.

        Raises:
          ValueError: the file is no such trace.
          ImportError: Zarr without the zarr library.
        """
        labels, data = store.load(path)
        return cls(labels, data)

    def __getstate__(self) -> dict[str, Any]:
        # Weights and tokenizer do not travel with a trace.
        labels = dataclasses.replace(self.labels_of, tokenizer=None)
        return {**self.__dict__, "source": None, "labels_of": labels}

    def __copy__(self) -> Trace:
        return dataclasses.replace(self, data=dict(self.data))

    def __deepcopy__(self, memo: dict[int, Any]) -> Trace:
        # The model is shared, as it never changes: a copy in the same process computes, too.
        return dataclasses.replace(self, data=copy.deepcopy(self.data, memo))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {dict(x.sizes)}" for name, x in self.data.items())
        under = f", under {'; '.join(self.interventions)}" if self.interventions else ""
        return f"<Trace of {len(self.tokens)} tokens{under}: {shapes or 'nothing held yet'}>"

    def __treescope_repr__(
        self, path: str | None, subtree_renderer: renderers.TreescopeSubtreeRenderer
    ) -> rendering_parts.Rendering:
        shown: dict[str, Any] = {"tokens": Facts([" ".join(map(repr, self.labels))])}
        if self.interventions:
            shown["interventions"] = Facts(self.interventions)
        about = f"<Trace {self.model_title}, {len(self.tokens)} tokens>"
        return draw({**shown, **pictures(self.data)}, about, path, subtree_renderer)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        # Not `_repr_html_`: treescope would put that into the tree that it draws.
        import treescope

        return {"text/plain": repr(self), "text/html": treescope.render_to_html(self)}

    def _held(self, s: Site, chosen: Chosen) -> xarray.DataArray | None:
        """The part of a site that is held; None where some of it is not."""
        array = self.data.get(s.name)
        if array is None:
            return None
        length, sizes = len(self.tokens), self.config.axis_sizes(chosen.layers[0])
        wanted = {
            "layer": chosen.layers,
            "query" if s.is_map else "position": chosen.positions or range(length),
            "head": chosen.heads or range(sizes["N"]),
            "kv_head": chosen.heads or range(sizes["K"]),
        }
        some = {dim: list(indices) for dim, indices in wanted.items() if dim in array.dims}
        if not all(set(indices) <= set(array[dim].values) for dim, indices in some.items()):
            return None
        return array.sel({d: i for d, i in some.items() if len(i) != array.sizes[d]})

    def _labelled(self, s: Site, values: np.ndarray, chosen: Chosen) -> xarray.DataArray:
        return self.labels_of.array(
            values,
            dims_of(s),
            s.name,
            {"site": s.holds},
            layers=chosen.layers,
            positions=chosen.positions,
            heads=chosen.heads,
        )


def trace(
    model: GemmaTransformer,
    tokens_or_text: str | Sequence[int] | np.ndarray,
    *,
    tokenizer: Tokenizer | None = None,
    sites: Sequence[str] | str = ("attention",),
    layers: Indices = None,
    positions: Indices = None,
    heads: Indices = None,
    dtype: str = "float32",
    turns: Sequence[int] | None = None,
    roles: Sequence[str] | None = None,
) -> Trace:
    """Runs a text through the model and keeps what the `sites` saw.

    The pass is the plain linen module in the precision of the model's parameters, under the model's
    interventions; one that names positions which the text does not reach is an InterventionWarning.
    Only the sites and layers asked for are ever materialised; the residual stream
    is kept besides, so that everything else can be had later without another pass.

    Args:
      model: what computes.
      tokens_or_text: token ids, or a text (then with a tokenizer; <bos> is put in front).
      tokenizer: for texts, and for the token labels; without it tokens are labelled by their ids.
      sites: see `gnb.list_sites`; an alias ("pattern", "resid_post") is as good, and none at all
        computes nothing until it is looked at.
      layers: which layers; None for all.
      positions: which positions (queries, on maps); None for all.
      heads: which query heads, or key-value heads where only sites that have these are asked for;
        None for all.
      dtype: of what is kept; "float16" halves it.
      turns: (T,) the conversation's turn of each token; `chat.trace` fills it in.
      roles: T names, who speaks in each token's turn.

    Returns:
      A `Trace`.  `trace.attention` is (layer, head, query, key); per-position sites are
      (layer, position, ...).  Coordinates carry token strings and layer kinds.

    Raises:
      ValueError: an unknown site or layer, an empty text, ids outside the vocabulary, or a request
        larger than the limit; the message says what to ask for instead.
      TypeError: no model, text, ids or tokenizer where one is expected.
    """
    expect(model, GemmaTransformer, "model", "gnb.trace(model, text, tokenizer=tokenizer)")
    ids = token_ids(model, tokens_or_text, tokenizer)
    warn_of_unreached(model.interventions, len(ids))
    return captured(
        *(model, ids, tokenizer),
        sites=sites,
        layers=layers,
        positions=positions,
        heads=heads,
        dtype=dtype,
        turns=turns,
        roles=roles,
    )


@pinned
def captured(
    model: GemmaTransformer,
    ids: np.ndarray,
    tokenizer: Tokenizer | None,
    *,
    sites: Sequence[str] | str,
    layers: Indices = None,
    positions: Indices = None,
    heads: Indices = None,
    dtype: str = "float32",
    turns: Sequence[int] | None = None,
    roles: Sequence[str] | None = None,
) -> Trace:
    """`trace` of (T,) int32 ids, which are not the end of the text where a conversation goes on."""
    names = [sites] if isinstance(sites, str) else list(sites)
    wanted = [site_of(model, name) for name in names]
    chosen = Chosen.of(wanted, model.config, len(ids), layers, positions, heads)
    refuse_too_large(wanted, chosen, len(ids), model.config, dtype)
    labels = Labels(
        config=model.config,
        ids=ids,
        tokens=tuple(tokenizer.token_text(i) if tokenizer else str(i) for i in ids.tolist()),
        turns=None if turns is None else np.asarray(turns, np.int32),
        roles=None if roles is None else tuple(roles),
        attrs={
            "model": model.title,
            "interventions": lines_of(model.interventions),
        },
        tokenizer=tokenizer,
    )
    source = Pass.of(model, ids)
    traced = Trace(labels, {}, source)
    select = Selection(chosen.positions, chosen.heads, dtype)
    values = source.capture(wanted, chosen.layers, select) if wanted else {}
    for s in wanted:
        traced.data[s.name] = traced._labelled(s, values[s.name], chosen)
    return traced


def token_ids(model: GemmaTransformer, given: Any, tokenizer: Tokenizer | None) -> np.ndarray:
    """(T,) int32 of a text or of ids; raises as `trace` says."""
    if tokenizer is not None and not hasattr(tokenizer, "token_text"):
        expect(tokenizer, Tokenizer, "tokenizer", "model, tokenizer = gnb.load(...)")
    if isinstance(given, str):
        if tokenizer is None:
            raise ValueError("a text needs tokenizer=...; or pass token ids")
        given = tokenizer.encode(given, bos=True)
    way = "give a text with tokenizer=..., or the ids of one text"
    ids = token_array(given, "tokens_or_text", way)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]  # a batch of one text
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(
            "tokens_or_text must be one text, or its token ids (T,) and not empty, got "
            f"{a(given)} of shape {ids.shape}: trace several texts one by one"
        )
    if ids.min() < 0 or ids.max() >= model.config.num_embed:
        raise ValueError(
            f"token ids must lie in 0 to {model.config.num_embed - 1}, "
            f"got {ids.min()} to {ids.max()}"
        )
    return ids.astype(np.int32)
