"""The official parameter tree against other layouts of the same numbers.  Pure functions.

Official leaves keep heads as axes (`q_einsum/w (N, D, H)`); GGUF and Hugging Face files hold one
matrix (out, in) per projection.  `leaves` says, for every official leaf, which matrices it is made
of; everything else here follows from that table.

Official checkpoints themselves come in two spellings: nested as the linen module has it, and flat,
two levels deep, as most were released (`"transformer/layer_0/mlp/linear": {"w": ...}`).  `official`
reads either, `released` writes the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_nb.config import TransformerConfig
from gemma_nb.errors import CheckpointError

Path = tuple[str, ...]
_Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One official parameter and the matrices that other layouts keep it in.

    Attributes:
      path: names down the official tree, for example ("layer_0", "attn", "q_einsum", "w").
      shape: of the official array.
      gguf: names of its tensors in a GGUF file.
      hf: names of the same tensors in a Hugging Face checkpoint.
      shapes: their shapes, row-major, (out, in) for projections.
      join: those tensors -> the official array.
      split: the official array -> those tensors.
      is_norm: an RMSNorm scale s; GGUF files store 1 + s, Hugging Face stores s.
    """

    path: Path
    shape: tuple[int, ...]
    gguf: tuple[str, ...]
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    join: Callable[[_Arrays], np.ndarray]
    split: Callable[[np.ndarray], _Arrays]
    is_norm: bool = False


def leaves(config: TransformerConfig) -> Iterator[Leaf]:
    """Every parameter of a Gemma 1, 2 or 3 text model, embedding first."""
    yield _plain(
        ("embedder", "input_embedding"),
        "token_embd",
        "model.embed_tokens",
        (config.num_embed, config.embed_dim),
    )
    for i in range(config.num_layers):
        yield from _attention(config, i)
        yield from _feed_forward(config, i)
        yield from _norms(config, i)
    yield _norm(("final_norm", "scale"), "output_norm", "model.norm", config.embed_dim)


def _plain(
    path: Path, gguf: str, hf: str, shape: tuple[int, ...], *, is_norm: bool = False
) -> Leaf:
    return Leaf(
        path,
        shape,
        (f"{gguf}.weight",),
        (f"{hf}.weight",),
        (shape,),
        join=lambda arrays: arrays[0],
        split=lambda array: [array],
        is_norm=is_norm,
    )


def _norm(path: Path, gguf: str, hf: str, width: int) -> Leaf:
    return _plain(path, gguf, hf, (width,), is_norm=True)


def _names(
    i: int, gguf: Iterable[str], hf: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (
        tuple(f"blk.{i}.{name}.weight" for name in gguf),
        tuple(f"model.layers.{i}.{name}.weight" for name in hf),
    )


def _attention(config: TransformerConfig, i: int) -> Iterator[Leaf]:
    n, k, h, d = (config.axis_sizes(i)[axis] for axis in "NKHD")
    attn = (f"layer_{i}", "attn")
    q = ("attn_q", "self_attn.q_proj")
    kv = (("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"))
    if n == k:  # the official tree keeps the three together when their shapes agree
        yield _projections((*attn, "qkv_einsum", "w"), i, (q, *kv), n, h, d)
    else:
        yield _projections((*attn, "q_einsum", "w"), i, (q,), n, h, d)
        yield _projections((*attn, "kv_einsum", "w"), i, kv, k, h, d)
    yield Leaf(
        (*attn, "attn_vec_einsum", "w"),
        (n, h, d),
        *_names(i, ["attn_output"], ["self_attn.o_proj"]),
        ((d, n * h),),
        join=lambda arrays: arrays[0].reshape(d, n, h).transpose(1, 2, 0),
        split=lambda array: [array.transpose(2, 0, 1).reshape(d, n * h)],
    )
    if config.use_qk_norm:
        for which in ("query", "key"):
            gguf, hf = (
                f"blk.{i}.attn_{which[0]}_norm",
                f"model.layers.{i}.self_attn.{which[0]}_norm",
            )
            yield _norm((*attn, f"_{which}_norm", "scale"), gguf, hf, h)


def _projections(
    path: Path, i: int, names: Sequence[tuple[str, str]], heads: int, h: int, d: int
) -> Leaf:
    """Matrices (heads*H, D) -> (heads, D, H), stacked in front when there are several."""

    def join(arrays: _Arrays) -> np.ndarray:
        each = [a.reshape(heads, h, d).transpose(0, 2, 1) for a in arrays]
        return each[0] if len(each) == 1 else np.stack(each)

    def split(array: np.ndarray) -> _Arrays:
        each = [array] if len(names) == 1 else list(array)
        return [a.transpose(0, 2, 1).reshape(heads * h, d) for a in each]

    gguf, hf = _names(i, (g for g, _ in names), (f for _, f in names))
    stack = () if len(names) == 1 else (len(names),)
    shapes = ((heads * h, d),) * len(names)
    return Leaf(path, (*stack, heads, d, h), gguf, hf, shapes, join, split)


def _feed_forward(config: TransformerConfig, i: int) -> Iterator[Leaf]:
    f, d = (config.axis_sizes(i)[axis] for axis in "FD")
    transposed = config.transpose_gating_einsum

    def join_gating(arrays: _Arrays) -> np.ndarray:
        gate_up = np.stack(arrays)
        return gate_up if transposed else gate_up.transpose(0, 2, 1)

    def split_gating(array: np.ndarray) -> _Arrays:
        return list(array if transposed else array.transpose(0, 2, 1))

    yield Leaf(
        (f"layer_{i}", "mlp", "gating_einsum"),
        (2, f, d) if transposed else (2, d, f),
        *_names(i, ["ffn_gate", "ffn_up"], ["mlp.gate_proj", "mlp.up_proj"]),
        ((f, d), (f, d)),
        join_gating,
        split_gating,
    )
    yield Leaf(
        (f"layer_{i}", "mlp", "linear"),
        (f, d),
        *_names(i, ["ffn_down"], ["mlp.down_proj"]),
        ((d, f),),
        join=lambda arrays: arrays[0].T,
        split=lambda array: [array.T],
    )


def _norms(config: TransformerConfig, i: int) -> Iterator[Leaf]:
    post = config.use_post_attn_norm
    # Hugging Face calls the norm before the feed-forward "post_attention" where no other norm
    # follows attention (Gemma 1).
    pre_ffw = "pre_feedforward_layernorm" if post else "post_attention_layernorm"
    table = [
        ("pre_attention_norm", "attn_norm", "input_layernorm", True),
        ("post_attention_norm", "post_attention_norm", "post_attention_layernorm", post),
        ("pre_ffw_norm", "ffn_norm", pre_ffw, True),
        ("post_ffw_norm", "post_ffw_norm", "post_feedforward_layernorm", config.use_post_ffw_norm),
    ]
    for name, gguf, hf, present in table:
        if present:
            path = (f"layer_{i}", name, "scale")
            yield _norm(path, f"blk.{i}.{gguf}", f"model.layers.{i}.{hf}", config.embed_dim)


def nest(flat: Mapping[Path, Any] | Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """{("a", "b"): x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items() if isinstance(flat, Mapping) else flat:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """{"a": {"b": x}} -> {("a", "b"): x}."""
    flat: dict[Path, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, (*prefix, name)))
        else:
            flat[(*prefix, name)] = value
    return flat


# Parts of official checkpoints that are no text model: the vision encoder and its way into the
# embedding, and what a Kauldron trainer keeps beside the parameters.
_NOT_TEXT = frozenset(
    {
        ("vision_encoder",),
        ("SigLiPFromPatches_0",),
        ("embedder", "mm_input_projection"),
        ("embedder", "mm_soft_embedding_norm"),
        ("opt_state",),
        ("step",),
        ("collections",),
    }
)
_WRAPPERS = ("params", "transformer")
EMBEDDING: Path = ("embedder", "input_embedding")


def split(keys: Sequence[str]) -> Path:
    """Keys of either spelling as names, one below the other."""
    return tuple(name for key in keys for name in key.split("/"))


def is_wrapper(path: Path) -> bool:
    """True where a path only stands around official ones."""
    return all(part in _WRAPPERS for part in path)


def official_path(keys: Sequence[str]) -> Path | None:
    """The official path of a stored parameter; None where it belongs to no text model.

    Takes nested and flat keys, with or without `params` and `transformer` around them, and the
    older names of the feed-forward weights (`mlp/gating_einsum/w` for `mlp/gating_einsum`).
    """
    path = split(keys)
    while len(path) > 1 and path[0] in _WRAPPERS:
        path = path[1:]
    if path[:1] in _NOT_TEXT or path[:2] in _NOT_TEXT:
        return None
    if path[1:2] == ("mlp",) and path[3:] == ("w",):
        return path[:3]
    return path


def official(params: Mapping[str, Any], name: str = "params") -> dict[Path, Any]:
    """The text parameters of an official tree, in either spelling, by official path.

    Args:
      params: nested or flat; leaves are whatever they are.
      name: of the checkpoint, for messages.

    Raises:
      CheckpointError: it is no dictionary, two entries are the same parameter, or a name is no
        text.
    """
    found: dict[Path, Any] = {}
    if not isinstance(params, Mapping):
        raise CheckpointError(
            f"{name}: expected a dictionary of arrays, got {type(params).__name__}; pass the tree "
            'of an official checkpoint, for example {"embedder": {"input_embedding": ...}, ...}'
        )
    for keys, value in flatten(params).items():
        if not all(isinstance(key, str) for key in keys):
            raise CheckpointError(
                f"{name}: {keys!r} is not a name of a parameter; pass the tree of an official "
                'checkpoint, for example {"embedder": {"input_embedding": ...}, "layer_0": ...}'
            )
        path = official_path(keys)
        if path in found:
            raise CheckpointError(
                f"{name}: {'/'.join(path)} is there twice, the second time as {'/'.join(keys)}; "
                "pass the parameters of one model"
            )
        if path is not None:
            found[path] = value
    return found


def released(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The flat spelling of official params: {"transformer/layer_0/attn/q_einsum": {"w": ...}}."""
    flat: dict[str, dict[str, Any]] = {}
    for path, value in flatten(params).items():
        *above, leaf = (*path, "w") if path[1:2] == ("mlp",) else path
        flat.setdefault("/".join(("transformer", *above)), {})[leaf] = value
    return flat


def to_hf(params: Mapping[str, Any], config: TransformerConfig) -> dict[str, np.ndarray]:
    """Official params (nested) -> tensors under Hugging Face names (text model, tied head)."""
    flat = flatten(params)
    tensors: dict[str, np.ndarray] = {}
    for leaf in leaves(config):
        tensors.update(zip(leaf.hf, leaf.split(np.asarray(flat[leaf.path])), strict=True))
    return tensors


def to_gguf(params: Mapping[str, Any], config: TransformerConfig) -> dict[str, np.ndarray]:
    """Official params (nested) -> tensors under GGUF names, norm scales as 1 + scale."""
    flat = flatten(params)
    tensors: dict[str, np.ndarray] = {}
    for leaf in leaves(config):
        array = np.asarray(flat[leaf.path])
        tensors.update(
            zip(leaf.gguf, leaf.split(array + 1 if leaf.is_norm else array), strict=True)
        )
    return tensors
