"""Traces as treescope trees: pictures of arrays whose axes say what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_nb.checkpoints.memory import bytes_text

if TYPE_CHECKING:
    import xarray
    from treescope import renderers, rendering_parts

_CELLS = 4000  # numbers drawn of an array
_ALONG = 64  # of them along one axis
# Which coordinate names the items of an axis.
_ITEMS = {
    "position": "token",
    "query": "query_token",
    "key": "key_token",
    "layer": "layer_kind",
    "component": "component",
}


class Picture:
    """An array in a tree: one line, and below it a picture with a slider for each further axis."""

    def __init__(self, array: xarray.DataArray) -> None:
        self.array = array

    def line(self) -> str:
        """Its type, axes and size."""
        axes = ", ".join(f"{dim}:{size}" for dim, size in self.array.sizes.items())
        return f"{self.array.dtype} ({axes}), {bytes_text(self.array.nbytes)}"

    def figure(self) -> Any:
        """The picture; the last two axes are drawn, the others slide."""
        import treescope

        array = self.array
        # The middle of what is large is left out by treescope; sliders show their first items.
        array = array.isel({dim: slice(_ALONG) for dim in array.dims[:-2]})
        labels, items = {}, {}
        for axis, dim in enumerate(array.dims):
            labels[axis] = f"{dim}: {array.sizes[dim]}"
            name = _ITEMS.get(str(dim), str(dim))
            if name in array.coords:
                texts = map(str, array.coords[name].values)
                items[axis] = [f"{i} {text}" for i, text in enumerate(texts)]
        values = np.where(np.isfinite(array.values), array.values, np.nan).astype(np.float32)
        count = values.ndim
        return treescope.render_array(
            values,
            rows=[count - 2] if count > 1 else [],
            columns=[count - 1],
            sliders=list(range(count - 2)),
            valid_mask=np.isfinite(values),
            truncate=True,
            maximum_size=_CELLS,
            cutoff_size_per_axis=_ALONG,
            axis_labels=labels,
            axis_item_labels=items,
        )

    def __treescope_repr__(
        self, path: str | None, subtree_renderer: renderers.TreescopeSubtreeRenderer
    ) -> rendering_parts.Rendering:
        from treescope import rendering_parts as parts

        del subtree_renderer
        return parts.build_foldable_tree_node_from_children(
            prefix=parts.text(f"<{self.line()}"),
            children=[self.figure().treescope_part],
            suffix=">",
            path=path,
            expand_state=parts.ExpandState.COLLAPSED,
        )


class Facts:
    """A line of text in a tree, such as an intervention."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = lines

    def __treescope_repr__(
        self, path: str | None, subtree_renderer: renderers.TreescopeSubtreeRenderer
    ) -> rendering_parts.Rendering:
        from treescope import rendering_parts as parts

        del subtree_renderer
        return parts.build_foldable_tree_node_from_children(
            prefix="[",
            children=[parts.text(line) for line in self.lines],
            suffix="]",
            path=path,
            expand_state=parts.ExpandState.EXPANDED,
        )


def pictures(data: Mapping[str, xarray.DataArray]) -> dict[str, Picture]:
    """Each array as it is shown in a tree."""
    return {name: Picture(array) for name, array in data.items()}
