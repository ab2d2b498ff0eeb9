"""A model's numbers from the names and shapes of its official parameters.

Shapes give the sizes, names the family: only Gemma 3 normalises queries and keys, only Gemma 2 and
3 have norms behind attention and feed-forward.  Windows, rotary bases, soft-caps and the query
scale leave no trace in any shape.  They are taken from the one released size that fits, or from the
caller; they are never guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from gemma_nb import presets
from gemma_nb.checkpoints import layout
from gemma_nb.config import Global, LayerSpec, Sliding, TransformerConfig
from gemma_nb.errors import CheckpointError

Shapes = Mapping[layout.Path, tuple[int, ...]]

# What no shape tells: every field that a caller has to give for a size that was never released.
_UNSEEN = ("layers", "query_pre_attn_scalar", "attn_logits_soft_cap", "final_logit_soft_cap")

_GATING = "transpose_gating_einsum"

_MAX_LAYERS = 256  # the largest Gemma has 62

# What shapes and names tell for certain, and a released size has to agree with.
_SHAPED = (
    *("embed_dim", "hidden_dim", "num_heads", "num_kv_heads", "head_dim"),
    *("use_qk_norm", "use_post_attn_norm", "use_post_ffw_norm"),
)

# Checkpoints round the vocabulary up to a multiple of 128 (256,000 pieces, 256,128 rows).
_VOCABULARY_PADDING = 128

# Names that only other families have, and what those are called.
_FOREIGN = {
    "altup": "Gemma 3n",
    "per_layer": "Gemma 3n or 4",
    "laurel": "Gemma 3n",
    "moe": "Gemma 4",
    "router": "Gemma 4",
    "skip_scale": "Gemma 4",
    "stacked_layers": "a checkpoint with stacked layers",
}


def config_of(
    params: Mapping[str, Any], *, name: str = "the parameters", **overrides: Any
) -> TransformerConfig:
    """The configuration of official params.

    Args:
      params: nested or flat official tree; its leaves have a `shape`.
      name: of the checkpoint, for messages.
      **overrides: fields of `TransformerConfig` that are known otherwise.  They win over the
        released size; those that shapes tell must agree with them.

    Raises:
      CheckpointError: the parameters are not those of a Gemma 1, 2 or 3 text model, or contradict
        each other or `overrides`, or fit no released size, or several, while `overrides` leave
        open what no shape tells.
      TypeError: an override that is no field of `TransformerConfig`.
    """
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(set(overrides) - known):
        raise TypeError(f"no such field of TransformerConfig: {', '.join(unknown)}")
    shapes = shapes_of(params, name)
    facts = _Facts(shapes, name).read()
    num_layers = facts.pop("num_layers")
    if len(overrides.get("layers", range(num_layers))) != num_layers:
        raise CheckpointError(
            f"{name}: {len(overrides['layers'])} layers were given, the names say {num_layers}; "
            "give as many as there are"
        )
    for field, value in facts.items():
        if value is not None and overrides.get(field, value) != value:
            raise CheckpointError(
                f"{name}: {field}={overrides[field]!r} was given, the shapes say {value!r}; leave "
                "it out, or pass the parameters that belong to it"
            )
    fields = {k: v for k, v in facts.items() if v is not None} | overrides
    config = _complete(fields, num_layers, name)
    check(shapes, config, name)
    return config


def shapes_of(params: Mapping[str, Any], name: str = "the parameters") -> dict[Any, Any]:
    """Official path -> shape, of everything in `params` that belongs to the text model.

    Raises:
      CheckpointError: a leaf has no shape, or two are the same parameter.
    """
    shapes = {}
    for path, leaf in layout.official(params, name).items():
        shape = getattr(leaf, "shape", None)
        if shape is None:
            raise CheckpointError(
                f"{name}: {'/'.join(path)} is {type(leaf).__name__}, expected an array; pass "
                "the arrays of an official checkpoint"
            )
        shapes[path] = tuple(shape)
    return shapes


def check(shapes: Shapes, config: TransformerConfig, name: str = "the parameters") -> None:
    """Hold parameters to a configuration: all there, none besides, each in its shape.

    Raises:
      CheckpointError: they differ; the message names the first that does.
    """
    expected = {leaf.path: leaf.shape for leaf in layout.leaves(config)}
    extra = [path for path in shapes if path not in expected]
    _refuse_foreign(extra, name)
    for path, shape in expected.items():
        if path not in shapes:
            raise CheckpointError(
                f"{name}: parameter {'/'.join(path)} {shape} is missing; the checkpoint is "
                "incomplete, or of another model than its configuration says: download it again"
            )
        if shapes[path] != shape:
            raise CheckpointError(
                f"{name}: parameter {'/'.join(path)}: expected shape {shape}, got {shapes[path]}; "
                "the checkpoint and its configuration are of different models: use two that belong "
                "together"
            )
    if extra:
        raise CheckpointError(
            f"{name}: parameter {'/'.join(extra[0])} belongs to no Gemma 1, 2 or 3 text model; "
            "pass an official checkpoint (adapters such as LoRA have to be merged first)"
        )


def _refuse_foreign(paths: list[layout.Path], name: str) -> None:
    for path in paths:
        for mark, family in _FOREIGN.items():
            if any(mark in part for part in path):
                raise CheckpointError(
                    f"{name}: parameter {'/'.join(path)} shows {family}, which is not supported "
                    "yet; pass a Gemma 1, 2 or 3 with one parameter per layer"
                )


def _complete(fields: dict[str, Any], num_layers: int, name: str) -> TransformerConfig:
    """`fields` with what they leave open taken from the released size that has the same shapes."""
    fitting: dict[TransformerConfig, list[str]] = {}
    try:
        for size, preset in presets.PRESETS.items():
            if _fits(preset, fields, num_layers):
                fitting.setdefault(dataclasses.replace(preset, **fields), []).append(size)
        if len(fitting) == 1:
            return next(iter(fitting))
        if still_open := [field for field in (*_UNSEEN, _GATING) if field not in fields]:
            _fail_open(still_open, [size for sizes in fitting.values() for size in sizes], name)
        return TransformerConfig(**fields)
    except ValueError as error:
        raise CheckpointError(
            f"{name}: no possible model: {error}; pass the parameters of an official checkpoint"
        ) from error


def _fits(preset: TransformerConfig, fields: Mapping[str, Any], num_layers: int) -> bool:
    """True where a released size has these shapes, give or take padding of the vocabulary."""
    padding = abs(preset.num_embed - fields["num_embed"])
    return (
        preset.num_layers == num_layers
        and padding <= _VOCABULARY_PADDING
        and all(getattr(preset, field) == fields[field] for field in _SHAPED)
    )


def _fail_open(fields: list[str], choices: list[str], name: str) -> NoReturn:
    if choices:
        raise CheckpointError(
            f"{name}: the shapes are those of {' and '.join(choices)}, which differ in what no "
            f"shape tells; pass config=gnb.presets.by_name(...) with the right one"
        )
    raise CheckpointError(
        f"{name}: the shapes are those of no released size ({', '.join(presets.PRESETS)}), and do "
        f"not tell {', '.join(fields)}; pass the configuration: config=gnb.TransformerConfig(...)"
    )


class _Facts:
    """Names and shapes, each looked up in layer 0 and checked for rank."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        self._shapes, self._name = shapes, name

    def read(self) -> dict[str, Any]:
        """Fields of `TransformerConfig`, and num_layers; a gating layout that is open is None."""
        num_layers = self._num_layers()
        num_embed, embed_dim = self._shape(2, "embedder", "input_embedding")
        (heads, head_dim), kv_heads = self._heads(embed_dim)
        hidden_dim = self._shape(2, "layer_0", "mlp", "linear")[0]
        return {
            "num_embed": num_embed,
            "embed_dim": embed_dim,
            "hidden_dim": hidden_dim,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "num_layers": num_layers,
            "use_qk_norm": ("layer_0", "attn", "_query_norm", "scale") in self._shapes,
            "use_post_attn_norm": ("layer_0", "post_attention_norm", "scale") in self._shapes,
            "use_post_ffw_norm": ("layer_0", "post_ffw_norm", "scale") in self._shapes,
            _GATING: self._transposed(hidden_dim, embed_dim),
        }

    def _num_layers(self) -> int:
        names = {path[0] for path in self._shapes if path[0].startswith("layer_")}
        count = len(names)
        if not count:
            _refuse_foreign(list(self._shapes), self._name)
            self._missing("layer_0")
        for i in range(count):
            if f"layer_{i}" not in names:
                self._missing(f"layer_{i}")
        return count

    def _heads(self, embed_dim: int) -> tuple[tuple[int, int], int]:
        """(query heads, head dim), key-value heads."""
        attn = ("layer_0", "attn")
        if (*attn, "qkv_einsum", "w") in self._shapes:
            _, heads, _, head_dim = self._shape(4, *attn, "qkv_einsum", "w")
            return (heads, head_dim), heads
        heads, _, head_dim = self._shape(3, *attn, "q_einsum", "w")
        return (heads, head_dim), self._shape(4, *attn, "kv_einsum", "w")[1]

    def _transposed(self, hidden_dim: int, embed_dim: int) -> bool | None:
        shape = self._shape(3, "layer_0", "mlp", "gating_einsum")
        return None if hidden_dim == embed_dim else shape[1] == hidden_dim

    def _shape(self, rank: int, *path: str) -> tuple[int, ...]:
        shape = self._shapes.get(path)
        if shape is None:
            self._missing("/".join(path))
        if len(shape) != rank or min(shape) < 1:
            raise CheckpointError(
                f"{self._name}: parameter {'/'.join(path)}: expected {rank} axes, got shape "
                f"{shape}; pass an official Gemma checkpoint"
            )
        return shape

    def _missing(self, what: str) -> NoReturn:
        _refuse_foreign(list(self._shapes), self._name)
        raise CheckpointError(
            f"{self._name}: {what} is missing; expected the parameters of an official Gemma 1, 2 "
            "or 3 checkpoint: download it again"
        )


# --- configurations as JSON -----------------------------------------------------------------------


def to_json(config: TransformerConfig) -> dict[str, Any]:
    """A configuration as numbers, strings and lists, for `from_json`."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    fields["layers"] = [
        {
            "window": spec.kind.window if isinstance(spec.kind, Sliding) else None,
            "rope_base": spec.rope_base,
            "rope_scale": spec.rope_scale,
            **spec.own_sizes,
        }
        for spec in config.layers
    ]
    return fields


def from_json(fields: Any, name: str) -> TransformerConfig:
    """The configuration that `to_json` wrote.

    Raises:
      CheckpointError: a field is missing, unknown or of the wrong type.
    """
    try:
        if not 1 <= len(fields["layers"]) <= _MAX_LAYERS:
            raise ValueError(f"{len(fields['layers']):,} layers")
        layers = tuple(_layer_from_json(**layer) for layer in fields["layers"])
        scalars = {k: v for k, v in fields.items() if k != "layers"}
        for field, value in scalars.items():
            _check_scalar(field, value)
        return TransformerConfig(**scalars, layers=layers)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{name}: the stored configuration cannot be read ({error}); the checkpoint has been "
            "changed, or was written by a newer gemma_nb: save it again or update"
        ) from error


def _check_scalar(field: str, value: Any) -> None:
    """Refuse what `to_json` never wrote: text, numbers that are none, sizes that are not whole."""
    kinds = {f.name: str(f.type) for f in dataclasses.fields(TransformerConfig)}
    kind = kinds.get(field, "float | None")
    if value is None and "None" in kind:
        return
    if isinstance(value, bool) != kind.startswith("bool") or not isinstance(value, int | float):
        raise TypeError(f"{field} is {value!r:.60}")
    if kind == "int" and not (isinstance(value, int) and 1 <= value < 1 << 31):
        raise ValueError(f"{field} is {value!r:.60}")
    if kind.startswith("float") and not 0 < value < 1e12:
        raise ValueError(f"{field} is {value!r:.60}")


def _layer_from_json(
    window: int | None, rope_base: float, rope_scale: float, **own_sizes: int
) -> LayerSpec:
    if not (0 < rope_base < 1e12 and 0 < rope_scale < 1e12 and (window is None or window > 0)):
        raise ValueError(f"a layer of window {window}, rope {rope_base!r:.30}, {rope_scale!r:.30}")
    for field, size in own_sizes.items():
        _check_scalar(field, size)
    kind = Global() if window is None else Sliding(int(window))
    return LayerSpec(kind, float(rope_base), float(rope_scale), **own_sizes)
