"""What interventions are made of, and how the modules of a model call them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.indices import Indices, is_mask, listed, number
from gemma_nb.interventions.numbers import array, is_traced, known, padded, real
from gemma_nb.sites import SITES, check_heads, check_layers, site
from gemma_nb.structure import DrawnArray
from gemma_nb.summaries import one_line, summary

if TYPE_CHECKING:
    from treescope import renderers, rendering_parts

    from gemma_nb.config import TransformerConfig

# Positions: None is all, a slice from start up to stop, a list of them, or a mask of a text.
Positions: TypeAlias = Indices

_T = TypeVar("_T")
_LAST = 2**30  # a position that no text reaches
_LINE = 240  # characters of the line that tells an intervention of one's own


def node(cls: type[_T]) -> type[_T]:
    """A frozen dataclass and pytree with an `__init__` of its own.

    flax's decorator would call `__init__` with the fields to put a tree together again.
    """
    cls = dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    static = [f.name for f in fields if f.metadata.get("static")]
    traced = [f.name for f in fields if not f.metadata.get("static")]

    def flatten(item: Any) -> tuple[Any, tuple[Any, ...]]:
        keys = [(jax.tree_util.GetAttrKey(name), getattr(item, name)) for name in traced]
        return keys, tuple(getattr(item, name) for name in static)

    def unflatten(names: tuple[Any, ...], leaves: Iterable[Any]) -> Any:
        item = object.__new__(cls)
        fill(item, **dict(zip(traced, leaves, strict=True)))
        fill(item, **dict(zip(static, names, strict=True)))
        return item

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


def static() -> Any:
    """A field that is part of the program: another value compiles anew."""
    return dataclasses.field(metadata={"static": True})


@flax.struct.dataclass
class Where:
    """Absolute positions: those listed, and all from `start` up to `stop`.

    Attributes:
      start: () int32.
      stop: () int32.
      listed: (P,) int32, padded; nothing but padding where a range says it all.
      mask: length of the mask that it was made from; None for others, and once JAX has rebuilt it.
    """

    start: jax.Array
    stop: jax.Array
    listed: jax.Array
    mask: ClassVar[int | None] = None

    def __repr__(self) -> str:
        return summary(self) if is_traced(self) else f"<{self}>"

    @classmethod
    def of(cls, positions: Positions) -> Where:
        """From what a user writes.

        Raises:
          ValueError: a step, positions counted from an end that is not known here, or none.
        """
        if positions is None:
            positions = slice(None)
        if isinstance(positions, slice):
            known("positions", (positions.start, positions.stop))
            ends = (positions.start, positions.stop)
            start, stop = (None if end is None else number(end, "positions") for end in ends)
            start, stop = start or 0, _LAST if stop is None else stop
            if positions.step not in (None, 1) or start < 0 or stop < 0:
                raise ValueError(
                    f"positions={positions} must count up from the beginning of the context, "
                    "one by one: slice(start, stop)"
                )
            return cls(array(start, np.int32), array(stop, np.int32), ints(()))
        at, mask = taken(positions, "positions")
        none = array(0, np.int32)
        found = cls(none, none, from_zero(at, positions))
        fill(found, mask=mask)
        return found

    def beyond(self, length: int) -> list[int]:
        """The positions named that a text of `length` tokens does not reach.

        Of a range only its start counts; one that holds no position has no other.
        """
        if at := plain(self.listed):
            return [p for p in at if p >= length]
        start, stop = int(self.start), int(self.stop)
        return [start] if start >= min(length, stop) else []

    def __call__(self, positions: jax.Array) -> jax.Array:
        """Bool, like `positions`."""
        ranged = (self.start <= positions) & (positions < self.stop)
        return ranged | (positions[..., None] == self.listed).any(axis=-1)

    @property
    def last(self) -> int:
        """The last position, -1 for none."""
        return max([*plain(self.listed), int(self.stop) - 1 if self.stop > self.start else -1])

    def __str__(self) -> str:
        if at := plain(self.listed):
            return f"positions {short(at)}"
        start, stop = int(self.start), int(self.stop)
        if start >= stop:
            return "no position"
        if (start, stop) == (0, _LAST):
            return "all positions"
        return f"positions {start} on" if stop == _LAST else f"positions {start} to {stop - 1}"


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
        """Names of the sites where it acts."""
        raise NotImplementedError

    def beyond(self, length: int) -> list[int]:
        """The positions that it names and a text of `length` tokens does not reach."""
        return sorted({p for where in self._wheres() for p in where.beyond(length)})

    @property
    def last(self) -> int | None:
        """The last position at which it acts; None where it names none."""
        return max((where.last for where in self._wheres()), default=None)

    def unreached(self, length: int) -> str:
        """What of it a text of `length` tokens does not reach, in words; "" for nothing."""
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
    """All that is changed in a computation.

    Attributes:
      items: the interventions, in order.
      start: () int32, the first absolute position at which they act.
    """

    items: tuple[Intervention, ...]
    start: jax.Array

    def at(self, layer: Any, positions: jax.Array) -> LayerEdit:
        """What is changed in one layer, for tokens at `positions` (B, T)."""
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


def line_of(item: Intervention) -> str:
    """One intervention in one line."""
    # Traced numbers are told by their shapes alone.
    return one_line(summary(item) if is_traced(item) else str(item), _LINE)


def lines_of(under: Interventions | None) -> str:
    """What labelled arrays carry as "interventions": one on a line, "" without any.

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
        """Whether attention's edges or weights are changed anywhere (static)."""
        return any(item.edits_attention for item in self.interventions.items)

    def __call__(self, name: str, value: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """The value of a site, edited."""
        items = [item for item in self.interventions.items if name in item.sites]
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


def check(item: Any, config: TransformerConfig) -> None:
    """Raises ValueError for what is no intervention, or one that the model cannot carry out."""
    if isinstance(item, list | tuple) and item and isinstance(item[0], Intervention):
        raise ValueError(
            "interventions are given one by one: intervene(*interventions), got a list of them"
        )
    if not isinstance(item, Intervention):
        raise ValueError(
            f"expected interventions, such as gnb.AblateHeads({{5: [2]}}), got {item!r:.60}"
        )
    name = type(item).__name__
    if jax.tree_util.all_leaves([item]):
        raise ValueError(f"{name} is no pytree: decorate the class with @flax.struct.dataclass")
    editable = (*patchable(), "attention", "tokens")
    if unknown := set(item.sites) - set(editable):
        raise ValueError(
            f"{name} names the sites {', '.join(sorted(unknown))}, which cannot be changed; what "
            f"can be is {', '.join(editable)}"
        )
    for argument, length in item.masks:
        what = "layer" if argument.startswith("layer") else "head"
        count = config.num_layers if what == "layer" else _num_heads(item, config)
        if length != count:
            raise ValueError(
                f"{argument} is a mask of {length}, and there are {count} {what}s: a mask has one "
                f"truth value for each {what}"
            )
    item.check(config)


def _num_heads(item: Intervention, config: TransformerConfig) -> int:
    """How many heads there are where it acts."""
    names = [name for name in item.sites if name in patchable()]
    shape = shape_of(names[0], config, getattr(item, "layer", 0)) if names else ()
    return shape[0] if len(shape) > 1 else config.num_heads


def fill(target: Any, **fields: Any) -> None:
    """Sets fields of a frozen dataclass in its own `__init__`."""
    for name, value in fields.items():
        object.__setattr__(target, name, value)


def ints(values: Iterable[int]) -> jax.Array:
    """(n,) int32, padded with `NOWHERE`."""
    return padded(np.array(list(values), np.int32), np.int32)


def taken(given: Any, argument: str) -> tuple[list[int], int | None]:
    """Indices into what is not known yet, and the length of the mask that they were, or None.

    Raises:
      ValueError: no indices, a slice without an end, or traced ones.
    """
    known(argument, given)
    if isinstance(given, slice):
        if given.stop is None:
            raise ValueError(f"{argument}={given} needs an end here: name the {argument}")
        ends = (given.start or 0, given.stop, 1 if given.step is None else given.step)
        given = range(*(number(end, argument) for end in ends))
    found = listed(given, argument)
    mask = len(found) if is_mask(found) else None
    return found if mask is None else [i for i, chosen in enumerate(found) if chosen], mask


def single(given: Any, argument: str) -> jax.Array:
    """() int32 of an argument that names one thing.

    Raises:
      ValueError: no index, several, or a traced one.
    """
    return array(number(known(argument, given), argument, argument), np.int32)


def from_zero(positions: Sequence[int], given: Any, argument: str = "positions") -> jax.Array:
    """(P,) int32 absolute positions.

    Raises:
      ValueError: none, or one that is not from 0 on; the message shows what was `given`.
    """
    if not positions:
        raise ValueError(
            f"{argument} is empty, so that nothing would be changed: name at least one"
        )
    if min(positions) < 0:
        raise ValueError(f"{argument} must be whole numbers from 0 on, got {given!r:.80}")
    return ints(positions)


def plain(values: Any) -> list[Any]:
    """Layers, heads or positions as Python numbers, without the padding."""
    found = np.asarray(values)
    kept: list[Any] = found[real(found)].tolist()
    return kept


def short(values: Sequence[int]) -> str:
    """A list of numbers, cut where it is long."""
    shown = ", ".join(map(str, values[:6]))
    return shown if len(values) <= 6 else f"{shown}, ... ({len(values)} of them)"


def several(names: Sequence[str]) -> str:
    """A list of names, cut where it is long."""
    shown = ", ".join(names[:24])
    return shown if len(names) <= 24 else f"{shown}, ... ({len(names)} of them)"


def wide(mask: jax.Array, ndim: int) -> jax.Array:
    """(B, T) with axes of one behind, to stand beside an array of `ndim` axes."""
    return mask.reshape(*mask.shape, *(1,) * (ndim - mask.ndim))


def check_places(
    config: TransformerConfig,
    layers: jax.Array,
    heads: jax.Array | None = None,
    num_heads: int | None = None,
) -> None:
    """Raises ValueError for a layer or head that the model does not have.

    A negative one would act nowhere, as the modules count from 0.

    Args:
      config: of the model.
      layers: one or some.
      heads: one or some; None for all.
      num_heads: how many there are, where they are no query heads.
    """
    for name, given, count in (
        ("layer", layers, config.num_layers),
        ("head", heads, num_heads or config.num_heads),
    ):
        if given is None or is_traced(given):
            continue
        indices = plain(np.atleast_1d(given))
        (check_layers if name == "layer" else check_heads)(indices, count)
        if min(indices) < 0:
            raise ValueError(f"interventions count {name}s from 0, got {min(indices)}")


def check_width(given: int, expected: int, what: str) -> None:
    """Raises ValueError for a reference from a model of another size."""
    if given != expected:
        raise ValueError(f"{what} has {given} numbers, this model's has {expected}")


def check_patchable(name: str, layer: int | None) -> None:
    """Raises ValueError for a site that is unknown, computed from others, or elsewhere."""
    found = site(name)
    if name not in patchable():
        raise ValueError(f"{name} cannot be changed there; what can be is {', '.join(patchable())}")
    if found.per_layer != (layer is not None):
        raise ValueError(
            f"{name} exists {'in every layer: name one' if found.per_layer else 'once: layer=None'}"
        )


def patchable() -> list[str]:
    """Names of the sites whose values can be replaced: not maps, and not what is derived."""
    return [s.name for s in SITES.values() if s.home is not None and not s.sown and not s.is_map]


def shape_of(name: str, config: TransformerConfig, layer: Any) -> tuple[int, ...]:
    """Shape of one position's value of a site in a layer."""
    # Which layer is traced cannot be told: then it is taken to be like the first.
    concrete = SITES[name].per_layer and not is_traced(layer)
    sizes = config.axis_sizes(int(layer) if concrete else 0)
    return tuple(sizes[axis] for axis in SITES[name].dims[2:])
