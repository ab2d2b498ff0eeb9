"""The weights that decoding runs on: other storages of the official parameters."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb import processor
from gemma_nb.checkpoints import memory
from gemma_nb.cpu.head import Int8Head
from gemma_nb.cpu.pages import adjoining, use_huge_pages
from gemma_nb.cpu.storage import Int8Rows, Stored
from gemma_nb.executables import pinned, tried_together
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn import Transformer
from gemma_nb.typing import Params


@flax.struct.dataclass
class DecodingWeights:
    """What a step is given.

    Every array that a step is given costs some microseconds, so there are as few as possible.

    Attributes:
      given: of linen: the official tree under "params", without what stands elsewhere here, and
        `prepared` (see `gemma_nb.cpu.storage`) where it is faster.
      norms: the scales of all norms, one float32 array (n, width) per width; empty where they are
        in `given`.
      paths: whose they are, in order.
      scales: those of int8 rows, one float32 array (n, width) per width; empty where they are in
        the `Stored` weights themselves.
      owners: whose they are, in order: the path of a `Stored` weight, and which field of its rows.
      head: the vocabulary head of a single token; None for the plain one.
    """

    given: Params
    norms: tuple[jax.Array, ...] = ()
    paths: tuple[tuple[tuple[str, ...], ...], ...] = flax.struct.field(
        pytree_node=False, default=()
    )
    scales: tuple[jax.Array, ...] = ()
    owners: tuple[tuple[tuple[tuple[str, ...], str], ...], ...] = flax.struct.field(
        pytree_node=False, default=()
    )
    head: Int8Head | None = None

    @property
    def variables(self) -> Params:
        """What the module is applied to; slices under jit cost nothing."""
        flat = flax.traverse_util.flatten_dict(dict(self.given["params"]))
        for stacked, paths in zip(self.norms, self.paths, strict=True):
            flat.update({path: stacked[i] for i, path in enumerate(paths)})
        variables = {**self.given, "params": flax.traverse_util.unflatten_dict(flat)}
        if self.scales:
            weights = flax.traverse_util.flatten_dict(dict(self.given["prepared"]))
            for stacked, owners in zip(self.scales, self.owners, strict=True):
                for i, (path, field) in enumerate(owners):
                    rows = dataclasses.replace(weights[path].one, **{field: stacked[i]})
                    weights[path] = dataclasses.replace(weights[path], one=rows)
            variables["prepared"] = flax.traverse_util.unflatten_dict(weights)
        return variables

    @property
    def table(self) -> jax.Array:
        """(V, D), the embedding."""
        table: jax.Array = self.given["params"]["embedder"]["input_embedding"]
        return table

    def use_huge_pages(self) -> None:
        """Moves what single tokens read from end to end into huge pages.

        Not when they are made: the first token would wait for it.
        """
        stored = jax.tree.leaves(self.given.get("prepared", {}), is_leaf=_is_stored)
        rows = [weight.one.rows for weight in stored]
        use_huge_pages(rows if self.head is None else [*rows, self.head.rows])

    def for_one_token(self) -> DecodingWeights:
        """The same without what only several tokens at once use, and the scales stacked."""
        bare = self._with_stored(lambda stored: Stored(stored.one))
        weights = flax.traverse_util.flatten_dict(dict(bare.given.get("prepared", {})))
        found: dict[int, dict[tuple[tuple[str, ...], str], jax.Array]] = {}
        for path, stored in weights.items():
            for field in ("scale", "inputs"):
                if (scale := getattr(stored.one, field, None)) is not None:
                    found.setdefault(len(scale), {})[path, field] = scale
        return dataclasses.replace(
            bare._with_stored(_without_scales),
            scales=tuple(_stacked(list(scales.values())) for scales in found.values()),
            owners=tuple(tuple(scales) for scales in found.values()),
        )

    def for_several(self) -> tuple[DecodingWeights, list[DecodingWeights]]:
        """What several tokens use: of the ends, and of each layer by itself.

        A layer's have its own module's paths.  Layers whose weights are used in the same way have
        the same structure, however differently they are stored for single tokens.
        """
        several = self._with_stored(_for_several)
        names = {path[0] for path in self._paths() if path[0].startswith("layer_")}
        return several._below(None), [several._below(f"layer_{i}") for i in range(len(names))]

    def _paths(self) -> list[tuple[str, ...]]:
        """Of everything, without the collections."""
        trees = map(flax.traverse_util.flatten_dict, map(dict, self.given.values()))
        return [path for paths in (*trees, *self.paths) for path in paths]

    def _below(self, layer: str | None) -> DecodingWeights:
        """What stands in a layer, with paths from there; None: what stands in none."""

        def rest(path: tuple[str, ...]) -> tuple[str, ...] | None:
            if layer is None:
                return None if path[0].startswith("layer_") else path
            return path[1:] if path[0] == layer else None

        given: dict[str, Any] = {}
        for collection, tree in self.given.items():
            flat = flax.traverse_util.flatten_dict(dict(tree))
            found = {below: leaf for path, leaf in flat.items() if (below := rest(path))}
            given[collection] = flax.traverse_util.unflatten_dict(found)
        norms, paths = [], []
        for stacked, whose in zip(self.norms, self.paths, strict=True):
            which = [i for i, path in enumerate(whose) if rest(path)]
            if which:
                norms.append(jax.device_put(np.asarray(stacked)[which]))
                paths.append(tuple(below for path in whose if (below := rest(path))))
        head = self.head if layer is None else None
        return DecodingWeights(given, tuple(norms), tuple(paths), head=head)

    def _with_stored(self, change: Callable[[Stored], Stored]) -> DecodingWeights:
        def one(leaf: Any) -> Any:
            return change(leaf) if _is_stored(leaf) else leaf

        given = jax.tree.map(one, self.given, is_leaf=_is_stored)
        return dataclasses.replace(self, given=given)


def _for_several(stored: Stored) -> Stored:
    """Without what only single tokens use."""
    if stored.several is None and stored.one is not None:
        return Stored(dataclasses.replace(stored.one, streams=1))
    return Stored(None, stored.several)


def _without_scales(stored: Stored) -> Stored:
    if not isinstance(stored.one, Int8Rows):
        return stored
    return Stored(stored.one.replace(scale=None, inputs=None))  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Part:
    """Some weights, as a program takes them.

    Flattening hundreds of arrays anew would take part of a millisecond of every step.

    Attributes:
      leaves: the arrays.
      structure: what makes `DecodingWeights` of them.
      dtypes: theirs: models of one structure may differ in them.
    """

    leaves: list[jax.Array]
    structure: Any
    dtypes: str

    @classmethod
    def of(cls, weights: DecodingWeights) -> Part:
        """All of `weights`."""
        leaves, structure = jax.tree.flatten(weights)
        return cls(leaves, structure, " ".join(str(leaf.dtype) for leaf in leaves))


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, Stored)


# What is in use: sessions of one model, and of models that share all parameters, share it.
_made: weakref.WeakValueDictionary[Any, DecodingWeights] = weakref.WeakValueDictionary()


@pinned
def decoding_weights(model: GemmaTransformer) -> DecodingWeights:
    """The weights that decoding `model` runs on; made anew only where nobody holds them."""
    # They hold the parameters, whose identities therefore stay theirs.
    # Not the module itself: flax cannot hash one while Python ends, when the key is taken out.
    key = (hash(model.transformer), model.storage, *map(id, jax.tree.leaves(model.params)))
    made = _made.get(key)
    if made is None:
        with tried_together():
            made = _made[key] = _make(model)
    return made


def _make(model: GemmaTransformer) -> DecodingWeights:
    official = DecodingWeights({"params": model.params})
    # Joined axes would undo what a mesh splits, accelerators are fast in the official layout, and
    # somebody else's module knows no other.
    plain = model.mesh is not None or jax.default_backend() != "cpu"
    if plain or not isinstance(model.transformer, Transformer):
        return official
    int8 = model.storage == "int8"
    streams = processor.streams()
    # In a list, so that nothing else holds what is moved below.
    being_made = [
        model.transformer.prepare(model.params, int8=int8, columns=_columns(model), streams=streams)
    ]
    # Programs are traced and loaded while what precedes them is computed, so all are started before
    # anything is waited for.
    table = model.params["embedder"]["input_embedding"]
    head = None
    if table.dtype != jnp.float32 or int8:  # whoever asks for float32 asks for exactness
        head = Int8Head.of(table, streams=streams.int8)
    prepared = _adjoining(being_made.pop())
    params, norms = _split_norms(_without(model.params, prepared))
    return DecodingWeights(
        {"params": params, "prepared": prepared},
        # By the host: to compile it would take longer.
        norms=tuple(_stacked(list(scales.values())) for scales in norms.values()),
        paths=tuple(tuple(scales) for scales in norms.values()),
        head=head,
    )


def _adjoining(prepared: Params) -> Params:
    """A collection of `Stored` weights with its rows one behind the other in memory."""
    flat = flax.traverse_util.flatten_dict(prepared)
    del prepared
    rows = [stored.one.rows for stored in flat.values()]
    # Nothing but the list is to hold what is copied.
    bare = {path: _with_rows(stored, None) for path, stored in flat.items()}
    flat.clear()
    copies = zip(bare.items(), adjoining(rows), strict=True)
    moved = {path: _with_rows(stored, copy) for (path, stored), copy in copies}
    return cast(Params, flax.traverse_util.unflatten_dict(moved))


def _with_rows(stored: Stored, rows: Any) -> Stored:
    assert stored.one is not None
    return dataclasses.replace(stored, one=dataclasses.replace(stored.one, rows=rows))


def _split_norms(params: Params) -> tuple[Params, dict[int, dict[tuple[str, ...], jax.Array]]]:
    """`params` without the norms' scales, and these by width and path."""
    flat = flax.traverse_util.flatten_dict(dict(params))
    norms: dict[int, dict[tuple[str, ...], jax.Array]] = {}
    for path in [path for path in flat if path[-1] == "scale"]:
        scale = flat.pop(path)
        norms.setdefault(scale.shape[0], {})[path] = scale
    return cast(Params, flax.traverse_util.unflatten_dict(flat)), norms


def _stacked(scales: list[jax.Array]) -> jax.Array:
    """Scales as they are computed with, which for norms' also saves XLA a loop for each."""
    # Not `jnp.asarray`, which is a program: the first that JAX lowers in a process takes a third of
    # a second, and a second start lowers none.
    return jax.device_put(np.stack([np.asarray(scale, np.float32) for scale in scales]))


def _without(params: Params, prepared: Params) -> Params:
    """`params` less what `prepared` stands for: every array that is passed costs time."""
    flat = flax.traverse_util.flatten_dict(dict(params))
    replaced = flax.traverse_util.flatten_dict(prepared)
    joined = {(*path[:-1], name) for path in replaced if path[-1] == "qkv" for name in _JOINED}
    kept = {p: x for p, x in flat.items() if p not in replaced and p[:-1] not in joined}
    return cast(Params, flax.traverse_util.unflatten_dict(kept))


# What stands in one `qkv`.
_JOINED = ("q_einsum", "kv_einsum")


def _columns(model: GemmaTransformer) -> Any:
    """The dtype of the copy that several tokens at once are computed from; None for no copy."""
    layers = model.config.num_params() - model.config.num_embed * model.config.embed_dim
    own = model.params["embedder"]["input_embedding"].dtype
    if own == jnp.float32 and model.storage == "exact":
        return None  # the rows do as well
    # What is rounded is one product of bfloat16 instead of the three that an exact one takes: it
    # may need no matrix unit to be the faster one.  bfloat16 would not hold float32 parameters.
    fast = processor.has_matrix_unit() or (model.storage == "int8" and processor.prefers_bfloat16())
    dtype = jnp.bfloat16 if fast and own == jnp.bfloat16 else jnp.float32
    room = memory.available()
    return dtype if not room or 4 * layers * jnp.dtype(dtype).itemsize < room else None
