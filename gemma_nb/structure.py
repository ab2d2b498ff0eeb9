"""What a model takes, gives and consists of: named, sized and typed, without its megabytes.

The tree is drawn by treescope (https://treescope.readthedocs.io).  An array is shown as its axes,
its size and the mean and spread of a few of its numbers, and folded up below it a picture of the
ends of its axes; no array is copied for that.  Of a large model's weights pictures would take
seconds and megabytes: they are drawn where treescope was told to draw arrays
(`treescope.basic_interactive_setup()`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gemma_nb.axes import param_dims, word
from gemma_nb.checkpoints.memory import bytes_text
from gemma_nb.config import TransformerConfig
from gemma_nb.typing import Params

if TYPE_CHECKING:
    from treescope import renderers, rendering_parts

_RUNS, _RUN = 16, 256  # how many stretches of an array its spread is taken from, and their length
_FEW = 256  # arrays that are drawn without being asked for: a second, 400 kB
_CELLS, _EDGE = 600, 12  # numbers drawn of an array, and of those that stand at an end of an axis


@dataclasses.dataclass(frozen=True)
class ArrayStructure:
    """An array that is not there: the names and sizes of its axes, and its type.

    Attributes:
      sizes: axis name -> length, None where any length will do.
      dtype: for example "int32".
      holds: what its values are.
      optional: it may be left out.
    """

    sizes: Mapping[str, int | None]
    dtype: str
    holds: str = ""
    optional: bool = False

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of its axes."""
        return tuple(self.sizes)

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Their lengths."""
        return tuple(self.sizes.values())

    def __repr__(self) -> str:
        axes = ", ".join(k if n is None else f"{k}:{n}" for k, n in self.sizes.items())
        notes = "; ".join(x for x in (self.holds, "optional" if self.optional else "") if x)
        return f"{self.dtype}({axes})" + (f"  # {notes}" if notes else "")


def describe(leaf: Any, dims: tuple[str, ...] | None) -> str:
    """One line for an array: "bfloat16 (head:4, embedding:640, head_dim:256), 1.3 MB, ..."."""
    shape = tuple(leaf.shape)
    names = dims if dims is not None and len(dims) == len(shape) else ("",) * len(shape)
    axes = ", ".join(f"{word(d)}:{n}" if d else str(n) for d, n in zip(names, shape, strict=True))
    size = math.prod(shape) * np.dtype(leaf.dtype).itemsize
    values = "not initialised" if isinstance(leaf, jax.ShapeDtypeStruct) else _spread(leaf)
    return f"{leaf.dtype} ({axes}), {bytes_text(size)}, {values}"


def _spread(leaf: Any) -> str:
    """Mean and standard deviation of evenly spaced stretches, from this process's own part."""
    if isinstance(leaf, jax.core.Tracer):
        return "traced"
    shards = getattr(leaf, "addressable_shards", None)
    part = shards[0].data if shards else leaf
    if isinstance(part, np.ndarray) or next(iter(part.devices())).platform == "cpu":
        part = np.asarray(part)  # a view; from another device only the stretches are copied
    flat = part.reshape(-1)
    starts = np.linspace(0, max(flat.size - _RUN, 0), _RUNS).astype(int)
    short = flat.size <= _RUNS * _RUN
    taken = [flat] if short else [flat[i : i + _RUN] for i in starts]
    values = np.concatenate([np.asarray(x, np.float64) for x in taken])
    about = "" if short else "≈"
    if not np.isfinite(values).all():
        return f"{about}{np.mean(~np.isfinite(values)):.0%} of the values are NaN or infinite"
    return f"{about}{values.mean():.3g} ± {values.std():.3g}"


class DrawnArray:
    """An array in a tree: `describe`'s line, and below it a picture of the ends of its axes."""

    def __init__(self, array: Any, dims: tuple[str, ...] | None = None) -> None:
        self.array, self.dims = array, dims

    @classmethod
    def can_draw(cls, leaf: Any) -> bool:
        """Whether there are numbers here to draw."""
        if isinstance(leaf, (jax.ShapeDtypeStruct, jax.core.Tracer)) or math.prod(leaf.shape) < 2:
            return False
        return bool(getattr(leaf, "is_fully_addressable", True))

    def figure(self) -> Any:
        """The picture; the last two axes are drawn, the others slide."""
        import treescope

        count = self.array.ndim
        names = self.dims if self.dims is not None and len(self.dims) == count else None
        sizes = self.array.shape
        return treescope.render_array(
            self.array,
            rows=[count - 2] if count > 1 else [],
            columns=[count - 1],
            sliders=list(range(count - 2)),
            truncate=True,
            maximum_size=_CELLS,
            cutoff_size_per_axis=2 * _EDGE,
            axis_labels={
                i: f"{word(names[i]) if names else f'axis {i}'}: {n}" for i, n in enumerate(sizes)
            },
        )

    def __treescope_repr__(
        self, path: str | None, subtree_renderer: renderers.TreescopeSubtreeRenderer
    ) -> rendering_parts.Rendering:
        from treescope import rendering_parts as parts

        del subtree_renderer
        # Folded up, nothing but the line: there are many in a tree.
        picture = parts.indented_children([self.figure().treescope_part])
        return parts.build_custom_foldable_tree_node(
            label=parts.abbreviation_color(parts.text(describe(self.array, self.dims))),
            contents=parts.fold_condition(expanded=picture),
            path=path,
            expand_state=parts.ExpandState.COLLAPSED,
        )


class ParamTree:
    """A part of a parameter tree, drawn with axis names, layer kinds and array summaries."""

    def __init__(
        self,
        params: Params,
        config: TransformerConfig | None,
        path: tuple[str, ...] = (),
        few: bool | None = None,
    ) -> None:
        self.params, self.config, self.path = params, config, path
        self._few = len(jax.tree.leaves(params)) <= _FEW if few is None else few

    def __treescope_repr__(
        self, path: str | None, subtree_renderer: renderers.TreescopeSubtreeRenderer
    ) -> rendering_parts.Rendering:
        import treescope
        from treescope import rendering_parts as parts

        drawn = self._few or treescope.active_autovisualizer.get() is not None

        def line(name: str) -> Any:
            value, where = self.params[name], None if path is None else f"{path}[{name!r}]"
            if isinstance(value, Mapping):
                below = ParamTree(value, self.config, (*self.path, name), self._few)
                note = below.note()
                comment = parts.comment_color(parts.text(f" ({note})")) if note else ""
                tree = subtree_renderer(below, path=where)
                return parts.siblings_with_annotations(name, comment, ": ", tree)
            if drawn and DrawnArray.can_draw(value):
                tree = subtree_renderer(DrawnArray(value, self._dims(name)), path=where)
                return parts.siblings_with_annotations(f"{name}: ", tree)
            text = parts.text(describe(value, self._dims(name)))
            leaf = parts.siblings_with_annotations(f"{name}: ", parts.abbreviation_color(text))
            return parts.build_one_line_tree_node(leaf, path=where)

        state = parts.ExpandState
        return parts.build_foldable_tree_node_from_children(
            prefix="{",
            children=[line(name) for name in self.names()],
            suffix="}",
            comma_separated=True,
            path=path,
            expand_state=state.COLLAPSED if self.path else state.EXPANDED,
        )

    def names(self) -> list[str]:
        """The entries in the order of the computation: embedder, layers by number, final norm."""

        def order(name: str) -> tuple[int, int, str]:
            kind, _, number = name.partition("_")
            if kind == "layer" and number.isdigit():
                return 1, int(number), name
            return (0 if name == "embedder" else 2), 0, name

        return sorted(self.params, key=order) if not self.path else list(self.params)

    def note(self) -> str:
        """Of a layer: its kind and the parameters in it."""
        if len(self.path) != 1:
            return ""
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))
        kind, _, number = self.path[0].partition("_")
        layers = self.config.layers if self.config is not None else ()
        known = kind == "layer" and number.isdigit() and int(number) < len(layers)
        label = f"{layers[int(number)].kind.label}, " if known else ""
        return f"{label}{count:,} parameters"

    def _dims(self, name: str) -> tuple[str, ...] | None:
        gating = self.config is None or self.config.transpose_gating_einsum
        return param_dims((*self.path, name), transpose_gating=gating)


def draw(
    fields: Mapping[str, Any],
    summary: str,
    path: str | None,
    subtree_renderer: renderers.TreescopeSubtreeRenderer,
) -> rendering_parts.Rendering:
    """A model's tree: its fields below `summary`, the first of them opened."""
    from treescope import rendering_parts as parts

    children = [
        parts.siblings_with_annotations(
            f"{name}=", subtree_renderer(value, path=None if path is None else f"{path}.{name}")
        )
        for name, value in fields.items()
    ]
    name, _, about = summary.strip("<>").partition(" ")
    return parts.build_foldable_tree_node_from_children(
        prefix=f"{name}(",
        children=children,
        suffix=")",
        comma_separated=True,
        path=path,
        first_line_annotation=parts.comment_color(parts.text(f"  # {about}")),
        expand_state=parts.ExpandState.EXPANDED,
    )
