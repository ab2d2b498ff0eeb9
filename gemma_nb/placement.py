"""Where a model lives when there are several devices: a mesh, and what is split along its axes.

A mesh's axes are named for what they split:

    heads         query heads and key-value heads, the cache with them
    feed_forward  the hidden units of the feed-forward layers
    vocabulary    the rows of the embedding
    model         any of these three that has no axis of its own
    batch, data   the texts of a batch

What cannot be split evenly along its axis (a single key-value head on eight devices) is split along
the embedding instead, and the small norms are on every device.  The compiler (GSPMD,
arXiv:2105.04663) adds the communication; the modules know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

import flax
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemma_nb.axes import param_dims
from gemma_nb.config import TransformerConfig
from gemma_nb.nn import Transformer
from gemma_nb.typing import Params

MeshLike = Mesh | Literal["auto"] | None

# Axis letter -> names of the mesh axes that may split it, the first that the mesh has is taken.
SPLITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "N": ("heads", "model"),
        "K": ("heads", "model"),
        "F": ("feed_forward", "model"),
        "V": ("vocabulary", "model"),
        "B": ("batch", "data"),
    }
)
_KNOWN = tuple(dict.fromkeys(name for names in SPLITS.values() for name in names))


def resolve(mesh: MeshLike) -> Mesh | None:
    """The mesh that is meant, in the form that the rest of this module takes.

    Args:
      mesh: "auto" is one axis "model" over all devices of all hosts, or None where there is only
        one; a mesh with a single axis splits the model, whatever its name; None is None.

    Raises:
      ValueError: no mesh, or one whose axes nothing can be split along.
    """
    if mesh is None:
        return None
    if isinstance(mesh, str):
        if mesh != "auto":
            raise ValueError(f'expected a jax.sharding.Mesh, "auto" or None as mesh, got {mesh!r}')
        devices = np.array(jax.devices())
        return None if devices.size == 1 else Mesh(devices, ("model",))
    if not isinstance(mesh, Mesh):
        raise ValueError(f'expected a jax.sharding.Mesh, "auto" or None as mesh, got {mesh!r:.80}')
    names = mesh.axis_names
    if len(names) == 1 and names[0] not in _KNOWN:
        names = ("model",)
    unknown = [name for name in names if name not in _KNOWN]
    if unknown:
        raise ValueError(
            f"nothing is split along the mesh axis {unknown[0]!r}; the axes are {', '.join(_KNOWN)}"
        )
    # Where the axes are "explicit" every einsum would have to say its output's sharding.
    return Mesh(mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))


def partition(dims: Sequence[str], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How an array with axes `dims` is split over `mesh`, which comes from `resolve`."""
    taken: dict[int, str] = {}
    wanted = [_mesh_axis(dim, mesh) for dim in dims]
    for i, name in enumerate(wanted):
        if name and name not in taken.values() and shape[i] % mesh.shape[name] == 0:
            taken[i] = name
    fallback = next((name for name in wanted if name), None)
    if fallback and not taken and "D" in dims:
        i = list(dims).index("D")
        if shape[i] % mesh.shape[fallback] == 0:
            taken[i] = fallback
    return PartitionSpec(*(taken.get(i) for i in range(len(dims))))


def _mesh_axis(dim: str, mesh: Mesh) -> str | None:
    return next((name for name in SPLITS.get(dim, ()) if name in mesh.axis_names), None)


def shardings(config: TransformerConfig, mesh: MeshLike) -> dict[tuple[str, ...], NamedSharding]:
    """Where each official parameter goes: path down the tree -> sharding.

    `put(array, shardings(config, mesh)[path])` sends each device its own part only.

    Args:
      config: the model's numbers.
      mesh: as for `resolve`; with None the result is empty.
    """
    resolved = resolve(mesh)
    if resolved is None:
        return {}
    return {
        path: _param_sharding(path, leaf.shape, config, resolved)
        for path, leaf in flax.traverse_util.flatten_dict(_structure(config)).items()
    }


def _structure(config: TransformerConfig) -> dict[str, Any]:
    def init() -> Params:
        tokens = jax.numpy.zeros((1, 1), jax.numpy.int32)
        return Transformer(config).init(jax.random.key(0), tokens)["params"]

    return cast(dict[str, Any], jax.eval_shape(init))


def _param_sharding(
    path: Sequence[str], shape: Sequence[int], config: TransformerConfig, mesh: Mesh
) -> NamedSharding:
    dims = param_dims(path, transpose_gating=config.transpose_gating_einsum)
    if dims is None or len(dims) != len(shape):  # not of the text model: on every device
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, partition(dims, shape, mesh))


def put(array: Any, sharding: NamedSharding | None) -> jax.Array:
    """`array` on its devices: each of them, and each host, is sent its own part only.

    Args:
      array: the whole of it, on every host: of numpy, mapped from a file, or of JAX.
      sharding: None leaves it to JAX.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # `device_put` would compare all of it with the other hosts' before it takes a part.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def place(params: Params, config: TransformerConfig, mesh: MeshLike) -> Params:
    """`params` on the devices of `mesh`; as they are where that is None."""
    resolved = resolve(mesh)
    if resolved is None:
        return params
    flat = flax.traverse_util.flatten_dict(dict(params))
    placed = {
        path: put(leaf, _param_sharding(path, leaf.shape, config, resolved))
        for path, leaf in flat.items()
    }
    return cast(Params, flax.traverse_util.unflatten_dict(placed))


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that `params` are spread over; None where they are on one device."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return cast(Mesh, sharding.mesh)
    return None


def place_batch(x: Any, mesh: Mesh | None) -> Any:
    """`x`, whose first axis is the batch, split along it where the mesh has an axis for it."""
    if x is None or mesh is None:
        return x
    spec = partition(("B",), x.shape[:1], mesh)
    return put(x, NamedSharding(mesh, spec))


def cache_shardings(
    config: TransformerConfig, mesh: Mesh, *, batch_size: int = 1
) -> dict[str, dict[str, NamedSharding]]:
    """For `Transformer.init_cache(sharding=...)`: heads and batch split, as the params are."""
    name = _mesh_axis("K", mesh)

    def layer(sizes: Mapping[str, int]) -> dict[str, NamedSharding]:
        kv = partition(("B", "K"), (batch_size, sizes["K"]), mesh)
        batch, heads, width = kv[0], kv[1], None
        if heads is None and name and sizes["H"] % mesh.shape[name] == 0:
            width = name  # fewer heads than devices: each head's numbers are split
        return {
            "k": NamedSharding(mesh, PartitionSpec(batch, None, heads, width)),
            "v": NamedSharding(mesh, PartitionSpec(batch, None, heads, width)),
            "positions": NamedSharding(mesh, PartitionSpec(batch)),
            "end_index": NamedSharding(mesh, PartitionSpec(batch)),
        }

    return {f"layer_{i}": layer(config.axis_sizes(i)) for i in range(config.num_layers)}


def stream_shardings(config: TransformerConfig, mesh: Mesh) -> tuple[NamedSharding, ...]:
    """Shardings of each layer's (S, K*H) matrices in `gemma_nb.sampling.cache.StreamCache`."""
    name = _mesh_axis("K", mesh)

    def layer(sizes: Mapping[str, int]) -> NamedSharding:
        even = name is not None and sizes["K"] * sizes["H"] % mesh.shape[name] == 0
        return NamedSharding(mesh, PartitionSpec(None, name if even else None))

    return tuple(layer(config.axis_sizes(spec)) for spec in config.layers)


def vocabulary_sharding(config: TransformerConfig, mesh: Mesh | None) -> NamedSharding | None:
    """For (V,) arrays, which are split as the logits come."""
    if mesh is None:
        return None
    return NamedSharding(mesh, partition(("V",), (config.num_embed,), mesh))


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """The whole array on every device of `mesh`."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def fetch(x: Any) -> Any:
    """A tree of arrays on this host as numpy arrays, also where other hosts hold parts of them."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(x)):
        return jax.device_get(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
