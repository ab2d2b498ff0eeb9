"""Activation patching: which places of one run, put into another, bring its behaviour along.

A sweep has a cell for each layer, position or head, and a cell is a run of the corrupted text with
one place patched.  The model is causal and is computed layer by layer, so a cell differs from the
unpatched run only behind the patched position and above the patched layer: nothing else is
recomputed.  The cells of a layer go through each later layer as one batch.  Cells are packed two to
a row, the rest of a text behind position p beside the rest behind T - p, so that rows are full; the
keys and values before p come from the unpatched run.  The vocabulary is read at the end, where the
metric looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb import placement
from gemma_nb.executables import pinned
from gemma_nb.expected import expect
from gemma_nb.interp.labels import Labels
from gemma_nb.interp.metrics import Metric, resolve
from gemma_nb.interp.packing import Batch, Cell, SlotPatch, run_layer
from gemma_nb.interp.trace import Trace, trace
from gemma_nb.interp.vocabulary import normalise
from gemma_nb.interventions import Interventions
from gemma_nb.interventions.checks import shape_of
from gemma_nb.interventions.numbers import room
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn import Transformer
from gemma_nb.nn.layer import Block
from gemma_nb.nn.layer_input import Carry
from gemma_nb.sites import EVERYWHERE, canonical, spelled
from gemma_nb.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xarray

_AXES = ("layer", "position", "head")
_SITES = ("residual_pre", "residual_mid", "residual", "attn_out", "mlp_out", "z")
_ROWS = 16  # packed rows that go through a layer at a time
_BATCH_TOKENS = 1024  # fewer rows where texts are long


@pinned
def activation_patching(
    model: GemmaTransformer,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    over: Sequence[str] = ("layer", "position"),
    site: str | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = True,
) -> xarray.DataArray:
    """Runs `corrupted` once for each cell, with one place replaced by what it was in `clean`.

    Source: Meng et al. 2022, arXiv:2202.05262 (causal tracing); Heimersheim and Nanda 2024,
    arXiv:2404.15255, on how to choose the texts and the metric.

    What it does not mean: a cell that restores the metric is enough for it in this pair of texts,
    not necessary, and one that does not may have a backup elsewhere.  Patches are made one at a
    time, and their effects do not add up.

    Args:
      model: what computes both runs, under its interventions.
      clean: a text or token ids (or a `Trace` of `model`): where values come from.
      corrupted: a text or token ids of the same length: what is patched.
      metric: `LogitDifference(a, b)`, `Logit(a)`, or any traceable function of the (V,) logits
        after the last position.
      over: the axes of the sweep, out of "layer", "position" and "head".  Without "layer" a cell
        patches all layers at once, without "position" all positions, without "head" all heads.
      site: one of residual_pre, residual_mid, residual (or resid_pre, resid_mid, resid_post),
        attn_out, mlp_out and z; by default z where heads are swept, the residual stream before
        the layer otherwise.
      tokenizer: for texts and labels.
      progress: shows a progress bar.

    Returns:
      The metric in every cell, float32, with `over` as dims.  `attrs` have its values in the two
      unpatched runs, "clean" and "corrupted".

    Raises:
      ValueError: texts of different lengths, an unknown axis, site or token, heads of another site
        than z, no metric, or a transformer of another library.
    """
    way = "gnb.activation_patching(model, clean, corrupted, metric, tokenizer=tokenizer)"
    expect(model, GemmaTransformer, "model", way)
    if not isinstance(model.transformer, Transformer):
        raise ValueError("patching needs gnb.nn.Transformer on the same parameters")
    axes, site = _checked(over, site)
    traces = [
        x if isinstance(x, Trace) else trace(model, x, tokenizer=tokenizer, sites=())
        for x in (clean, corrupted)
    ]
    lengths = [len(t.tokens) for t in traces]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"clean and corrupted must be of one length, got {lengths[0]} and {lengths[1]} tokens"
        )
    labels: Labels = traces[1].labels_of
    sweep = _Sweep(model, traces[0], traces[1], site, resolve(metric, labels))
    values = sweep.run(axes, progress)
    ends = {
        n: sweep.measure(t.get("final", positions=-1).values)
        for n, t in zip(("clean", "corrupted"), traces, strict=True)
    }
    array = labels.array(
        values,
        axes,
        "patched",
        {
            "metric": sweep.metric.title(labels),
            "site": site,
            "over": ", ".join(axes),
            **{name: float(value[0]) for name, value in ends.items()},
        },
    )
    if "position" in axes:
        array = array.assign_coords(clean_token=("position", list(traces[0].labels)))
    return array


def _checked(over: Sequence[str], site: str | None) -> tuple[tuple[str, ...], str]:
    axes = (over,) if isinstance(over, str) else tuple(over)
    if not axes or set(axes) - set(_AXES) or len(set(axes)) != len(axes):
        raise ValueError(f"over must be some of {', '.join(_AXES)}, got {over!r}")
    site = canonical(site or ("z" if "head" in axes else "residual_pre"))
    if site not in _SITES:
        raise ValueError(f"site must be one of {spelled(_SITES)}, got {site!r}")
    if "head" in axes and site != "z":
        raise ValueError(f'over="head" patches z, got site={site!r}')
    return tuple(axis for axis in _AXES if axis in axes), site


class _Sweep:
    """All cells of one pair of texts."""

    def __init__(
        self, model: GemmaTransformer, clean: Trace, corrupted: Trace, site: str, metric: Any
    ) -> None:
        self.model, self.clean, self.corrupted = model, clean, corrupted
        self.site, self.metric = site, metric
        self.length = len(corrupted.tokens)
        self.rows = max(1, min(_ROWS, _BATCH_TOKENS // self.length))
        c = model.config
        # The unpatched run's keys and values, which all cells share: (T, K, H) of each layer.
        self.keys = [corrupted.get("k", i).values[0] for i in range(c.num_layers)]
        self.values = [corrupted.get("v", i).values[0] for i in range(c.num_layers)]

    def run(self, axes: tuple[str, ...], progress: bool) -> np.ndarray:
        """The metric of every cell."""
        from tqdm.auto import tqdm

        c = self.model.config
        sizes = {"layer": c.num_layers, "position": self.length, "head": c.num_heads}
        found = np.zeros([sizes[axis] for axis in axes], np.float32)
        batches = list(self._packed(axes))
        every = range(c.num_layers)
        swept = [range(i, i + 1) for i in every] if "layer" in axes else [every]
        total = sum(c.num_layers - layers[0] for layers in swept) * len(batches)
        with tqdm(total=total, disable=not progress, desc="patching", unit="layer") as bar:
            for layers in swept:
                place = tuple(layers) if "layer" in axes else ()
                for batch in batches:
                    states = self._cells(layers, batch, bar)
                    last = np.stack([states[r, end - 1] for r, _, end, _ in batch.spans])
                    measured = self.measure(self._final(last))
                    for (_, _, _, cell), value in zip(batch.spans, measured, strict=True):
                        found[(*place, *cell.place)] = value
        return found

    def measure(self, final: np.ndarray) -> np.ndarray:
        """The metric of (cells, D) final-normed states."""
        params, cap = self.model.params, self.model.config.final_logit_soft_cap
        size = 2 if self.metric.rows() is not None else 8
        found = []
        for start in range(0, len(final), _ROWS * size):
            some = final[start : start + _ROWS * size]
            padded = np.pad(some, ((0, _ROWS * size - len(some)), (0, 0)))
            table = params["embedder"]["input_embedding"]
            static = self.metric if self.metric.rows() is None else None
            traced = None if static is not None else self.metric
            found.append(placement.fetch(_measure(cap, static, traced, table, padded))[: len(some)])
        return np.concatenate(found)

    def _final(self, residual: np.ndarray) -> np.ndarray:
        """Final-normed, under the model's interventions."""
        final = normalise(self.model, residual)
        given = self.model.interventions
        if given is None:
            return final
        # Few counts of cells are compiled.
        padded = np.pad(final, ((0, room(len(final)) - len(final)), (0, 0)))
        at = np.full((len(padded), 1), self.length - 1, np.int32)
        return np.asarray(placement.fetch(_edited(given, at, padded)))[: len(final)]

    def _packed(self, axes: tuple[str, ...]) -> Iterator[Batch]:
        """The cells of one patched layer, two to a row where they fit, `rows` rows to a batch."""
        heads = range(self.model.config.num_heads) if "head" in axes else [None]
        places = range(self.length) if "position" in axes else [None]
        cells = []
        for p in places:
            for h in heads:
                place = tuple(i for i in (p, h) if i is not None)
                cells.append(Cell(p, h, place))
        cells.sort(key=lambda cell: cell.start)
        rows: list[list[Cell]] = []
        while cells:
            row = [cells.pop(0)]
            # The longest that still fits beside it.
            free = row[0].start
            fits = next((i for i, x in enumerate(cells) if self.length - x.start <= free), None)
            if fits is not None:
                row.append(cells.pop(fits))
            rows.append(row)
        for start in range(0, len(rows), self.rows):
            yield Batch.of(rows[start : start + self.rows], self.rows, self.length)

    def _cells(self, layers: range, batch: Batch, bar: Any) -> np.ndarray:
        """(rows, T, D): the stream after the last layer, of the patches in some layers."""
        c = self.model.config
        stream = self.corrupted.get("residual_pre", layers[0]).values[0][batch.source]
        carry = Carry(stream)
        patch = self._patch(layers[0], batch)
        for i in range(layers[0], c.num_layers):
            # Also where it acts nowhere, a patch is of its layer's shape.
            if i in layers[1:] or patch.values.shape[2:] != shape_of(self.site, c, i):
                patch = self._patch(i, batch)
            carry = run_layer(
                Block(c, c.layers[i]),
                self.site,
                self.model.params[f"layer_{i}"],
                self.model.interventions,
                np.int32(i),
                carry,
                batch.positions,
                batch.mask,
                self.keys[i],
                self.values[i],
                # Above the patched layers nothing is patched; the same program serves.
                patch if i in layers else patch.off(),
            )
            bar.update(1)
        return np.asarray(placement.fetch(carry.x))

    def _patch(self, layer: int, batch: Batch) -> SlotPatch:
        """Values and places that the slots of a batch are patched with."""
        values = self.clean.get(self.site, layer).values[0][batch.source]
        acts: Any = np.zeros(batch.positions.shape, bool)
        heads = np.ones((len(acts), acts.shape[1], self.model.config.num_heads), bool)
        for row, start, end, cell in batch.spans:
            acts[row, start : end if cell.position is None else start + 1] = True
            if cell.head is not None:
                heads[row, start:end] = np.arange(heads.shape[-1]) == cell.head
        return SlotPatch(acts, heads, values)


@jax.jit
def _edited(interventions: Interventions, at: jax.Array, final: jax.Array) -> jax.Array:
    """Final-normed states (cells, D) at positions (cells, 1), under interventions."""
    return interventions.at(EVERYWHERE, at)("final", final[:, None])[:, 0]


# Static: the soft-cap, and a metric that is a function.  Traced: the tokens of the others.
@partial(jax.jit, static_argnums=(0, 1))
def _measure(
    cap: float | None, static: Any, traced: Any, table: jax.Array, final: jax.Array
) -> jax.Array:
    metric = static if static is not None else traced
    rows = metric.rows()
    used = table if rows is None else table[rows]
    logits = final.astype(jnp.float32) @ used.T.astype(jnp.float32)
    return metric.of(logits if cap is None else cap * jnp.tanh(logits / cap)).astype(jnp.float32)
