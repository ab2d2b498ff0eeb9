"""Edits of parameters by their paths, and the titles that tell them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax.numpy as jnp

from gemma_nb.typing import Params

# Between a model's name and its edits, in titles.
EDITED = ", edited ("
_SHOWN = 3


def titled(name: str, edits: Sequence[str]) -> str:
    """A model's name and its edits, each once: "Gemma, edited (layer_*/mlp/linear)"."""
    if not edits:
        return name
    different = list(dict.fromkeys(edits))
    shown = different if len(different) <= _SHOWN else [*different[:_SHOWN], "..."]
    return f"{name}{EDITED}{', '.join(shown)})"


def edited(params: Params, glob: str, fn: Callable[[Any], Any]) -> tuple[Params, str]:
    """Parameters with `fn` applied to those whose path matches; the others are shared.

    Args:
      params: the official tree.
      glob: path from the root, as of `GemmaTransformer.edit`.
      fn: takes an array and returns one of the same shape.

    Returns:
      The new tree, and the glob as titles tell it.

    Raises:
      ValueError: no parameter matches, or `fn` changed a shape.
    """
    flat = flax.traverse_util.flatten_dict(dict(params))
    pattern = tuple(glob.strip("/").split("/"))
    matching = [path for path in flat if _matches(path, pattern)]
    if not matching:
        known = sorted({"/".join(_any_layer(path)) for path in flat})
        raise ValueError(f"no parameter matches {glob!r}; the parameters are {', '.join(known)}")
    for path in matching:
        new = jnp.asarray(fn(flat[path]))
        if new.shape != flat[path].shape:
            raise ValueError(
                f"{'/'.join(path)}: expected an array of shape {flat[path].shape} from fn, "
                f"got {new.shape}"
            )
        flat[path] = new
    return flax.traverse_util.unflatten_dict(flat), "/".join(pattern)


def _matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether names match the parts of a glob, "**" standing for any number of names."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return (
        bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
    )


def _any_layer(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path with the number of its layer left open."""
    return ("layer_*", *path[1:]) if path[0].startswith("layer_") else path
