"""Interventions, and how the modules of a model call them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import flax
import jax
import jax.numpy as jnp

from gemma_nb.interventions.numbers import is_traced, short
from gemma_nb.interventions.positions import Where
from gemma_nb.sites import canonical
from gemma_nb.structure import DrawnArray
from gemma_nb.summaries import one_line, summary

if TYPE_CHECKING:
    from treescope import renderers, rendering_parts

    from gemma_nb.config import TransformerConfig

_LINE = 240  # characters of the line that tells an intervention of one's own


class Intervention:
    """One change.  Subclasses are flax dataclasses: pytrees of arrays.

    `sites` names where it acts; `apply` gives the site's new value.  A class of one's own is told
    by its fields, or by its `__str__`.
    """

    edits_attention: ClassVar[bool] = False
    # Name and length of each argument that was a mask; none once JAX has rebuilt it.
    masks: ClassVar[tuple[tuple[str, int], ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Otherwise a dataclass gets one that prints its arrays.
        if "__repr__" not in vars(cls):
            cls.__repr__ = Intervention.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {line_of(self)}>"

    def __str__(self) -> str:
        return summary(self)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names, or aliases, of the sites where it acts."""
        raise NotImplementedError

    def beyond(self, length: int) -> list[int]:
        """The positions that it names and a text of `length` tokens does not reach."""
        return sorted({p for where in self._wheres() for p in where.beyond(length)})

    @property
    def last(self) -> int | None:
        """The last position at which it acts; None where it names none."""
        return max((where.last for where in self._wheres()), default=None)

    def unreached(self, length: int) -> str:
        """Positions that a text of `length` tokens does not reach, in words; "" for none."""
        masks = {where.mask for where in self._wheres()} - {None, length}
        if masks:
            return f"its mask of positions is {masks.pop()} long"
        beyond = self.beyond(length)
        if not beyond:
            return ""
        many = "positions" if len(beyond) > 1 else "position"
        return f"{many} {short(beyond)} {'are' if len(beyond) > 1 else 'is'} not reached"

    def _wheres(self) -> list[Where]:
        return [x for x in vars(self).values() if isinstance(x, Where)]

    def apply(
        self, value: jax.Array, layer: Any, positions: jax.Array, keys: jax.Array | None
    ) -> jax.Array:
        """The new value of the site.

        Args:
          value: (B, T, ...) of the site.
          layer: index, possibly traced; `EVERYWHERE` at sites that the model has once.
          positions: (B, T) absolute positions.
          keys: (B, S) positions in the key slots, on maps.
        """
        del layer, positions, keys
        return value

    def cut(self, mask: jax.Array, layer: Any, positions: jax.Array, keys: jax.Array) -> jax.Array:
        """(B, T, N, S) which keys a query may see, less what is knocked out."""
        del layer, positions, keys
        return mask

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError where the model has no such layer, head, neuron or shape."""

    def uncached(self, config: TransformerConfig, start: int) -> str:
        """Says why it cannot be computed with a cache from position `start` on; "" where it can."""
        del config, start
        return ""

    def __treescope_repr__(
        self, path: str | None, subtree_renderer: renderers.TreescopeSubtreeRenderer
    ) -> rendering_parts.Rendering:
        from treescope import rendering_parts as parts

        found = jax.tree_util.tree_flatten_with_path(self)[0]
        # Indices are told by the line.
        numbers = [
            (jax.tree_util.keystr(where).removeprefix("."), leaf)
            for where, leaf in found
            if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and DrawnArray.can_draw(leaf)
        ]
        if not numbers:
            return parts.build_one_line_tree_node(parts.text(str(self)), path=path)

        def drawn(name: str, leaf: Any) -> Any:
            where = None if path is None else f"{path}.{name}"
            tree = subtree_renderer(DrawnArray(leaf), path=where)
            return parts.siblings_with_annotations(f"{name}=", tree)

        return parts.build_foldable_tree_node_from_children(
            prefix=parts.text(f"{self} ("),
            children=[drawn(name, leaf) for name, leaf in numbers],
            suffix=")",
            path=path,
            expand_state=parts.ExpandState.COLLAPSED,
        )


@flax.struct.dataclass
class Interventions:
    """The changes of a computation.

    Attributes:
      items: the interventions, in order.
      start: () int32, the first absolute position at which they act.
    """

    items: tuple[Intervention, ...]
    start: jax.Array

    def at(self, layer: Any, positions: jax.Array) -> LayerEdit:
        """The changes in one layer, for tokens at `positions` (B, T)."""
        return LayerEdit(self, layer, positions)

    def describe(self) -> tuple[str, ...]:
        """One line for each."""
        traced = is_traced(self.start)
        start = "traced" if traced else int(self.start)
        note = f", from position {start} on" if start else ""
        return tuple(f"{line_of(item)}{note}" for item in self.items)

    def __repr__(self) -> str:
        return f"<Interventions: {self}>"

    def __str__(self) -> str:
        return "; ".join(self.describe())

    def __treescope_repr__(
        self, path: str | None, subtree_renderer: renderers.TreescopeSubtreeRenderer
    ) -> rendering_parts.Rendering:
        from treescope import rendering_parts as parts

        start = int(self.start)
        return parts.build_foldable_tree_node_from_children(
            prefix="Interventions(",
            children=[
                subtree_renderer(item, path=None if path is None else f"{path}.items[{i}]")
                for i, item in enumerate(self.items)
            ],
            suffix=f", from position {start} on)" if start else ")",
            path=path,
            expand_state=parts.ExpandState.EXPANDED,
        )


def sites_of(item: Intervention) -> tuple[str, ...]:
    """The names of the sites where an intervention acts, whichever words its class uses."""
    return tuple(map(canonical, item.sites))


def line_of(item: Intervention) -> str:
    """One intervention in one line."""
    # Traced numbers are told by their shapes alone.
    return one_line(summary(item) if is_traced(item) else str(item), _LINE)


def lines_of(under: Interventions | None) -> str:
    """The attribute "interventions" of labelled arrays: one on a line, "" without any.

    A text, because files take no lists of texts as an attribute.
    """
    return "" if under is None else "\n".join(under.describe())


@flax.struct.dataclass
class LayerEdit:
    """`Interventions` in one layer, as the modules call them: `edit(site, value)`.

    A pytree, so that layers are traced once for all of their kind.
    """

    interventions: Interventions
    layer: Any
    positions: jax.Array

    __repr__ = summary

    @property
    def edits_attention(self) -> bool:
        """True where attention's edges or weights are changed anywhere (static)."""
        return any(item.edits_attention for item in self.interventions.items)

    def __call__(self, name: str, value: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """The value of a site, edited."""
        items = [item for item in self.interventions.items if name in sites_of(item)]
        if not items:
            return value
        edited = value
        for item in items:
            edited = item.apply(edited, self.layer, self.positions, keys)
        acts = wide(self.positions >= self.interventions.start, value.ndim)
        return jnp.where(acts, edited.astype(value.dtype), value)

    def edges(self, mask: jax.Array, keys: jax.Array) -> jax.Array:
        """(B, T, N, S) which keys each query of each head may see."""
        cut = mask
        for item in self.interventions.items:
            cut = item.cut(cut, self.layer, self.positions, keys)
        return jnp.where((self.positions >= self.interventions.start)[:, :, None, None], cut, mask)


def wide(mask: jax.Array, ndim: int) -> jax.Array:
    """(B, T) with axes of one behind, to stand beside an array of `ndim` axes."""
    return mask.reshape(*mask.shape, *(1,) * (ndim - mask.ndim))
