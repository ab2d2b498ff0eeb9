"""Hugging Face's Gemma 1, 2 and 3, built from our configuration and official parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from gemma_nb.config import Global, LayerSpec, Sliding, TransformerConfig
from gemma_nb.typing import Params
from tests.parity.measure import Result


def _only(values: set[Any], what: str) -> Any:
    if len(values) != 1:
        raise ValueError(f"the reference has one {what} for all such layers, got {sorted(values)}")
    return values.pop()


def _rope(specs: list[LayerSpec]) -> dict[str, Any]:
    base = _only({spec.rope_base for spec in specs}, "RoPE base")
    scale = _only({spec.rope_scale for spec in specs}, "RoPE scale")
    if scale == 1:
        return {"rope_type": "default", "rope_theta": base}
    return {"rope_type": "linear", "rope_theta": base, "factor": scale}


def hf_config(config: TransformerConfig, attention: str = "eager") -> PreTrainedConfig:
    """Our configuration in the reference's words: of Gemma 3 if queries and keys are normalised,
    of Gemma 2 if attention's output is, of Gemma 1 otherwise.

    Its `sliding_window` means what ours does: a query at position p sees p - window < s <= p.

    Args:
      config: ours.
      attention: which of its implementations; only "eager" returns attention weights.

    Raises:
      ValueError: a configuration that the reference cannot express.
    """
    if config.use_post_attn_norm != config.use_post_ffw_norm:
        raise ValueError("the reference has both post-norms or none")
    shared = {
        "vocab_size": config.num_embed,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "attn_implementation": attention,
    }
    if not config.use_post_attn_norm:
        return _gemma1(config, shared)
    return _gemma3(config, shared) if config.use_qk_norm else _gemma2(config, shared)


def _gemma1(config: TransformerConfig, shared: dict[str, Any]) -> GemmaConfig:
    caps = (config.attn_logits_soft_cap, config.final_logit_soft_cap)
    kinds = {spec.kind for spec in config.layers}
    plain = config.query_pre_attn_scalar == config.head_dim and caps == (None, None)
    if config.use_qk_norm or kinds != {Global()} or not plain:
        raise ValueError("the reference is Gemma 1, which has no windows, soft-caps or QK norms")
    return GemmaConfig(**shared, rope_parameters=_rope(list(config.layers)))


def _gemma2(config: TransformerConfig, shared: dict[str, Any]) -> Gemma2Config:
    return Gemma2Config(**shared, **_common(config), rope_parameters=_rope(list(config.layers)))


def _gemma3(config: TransformerConfig, shared: dict[str, Any]) -> Gemma3TextConfig:
    rope = {
        "sliding_attention": _rope([s for s in config.layers if isinstance(s.kind, Sliding)]),
        "full_attention": _rope([s for s in config.layers if isinstance(s.kind, Global)]),
    }
    return Gemma3TextConfig(**shared, **_common(config), rope_parameters=rope)


def _common(config: TransformerConfig) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common and Gemma 1 has not."""
    scalar = config.query_pre_attn_scalar
    if scalar != int(scalar):
        raise ValueError(f"the reference wants a whole query_pre_attn_scalar, got {scalar}")
    kinds = [spec.kind for spec in config.layers]
    return {
        "query_pre_attn_scalar": int(scalar),
        "sliding_window": _only({k.window for k in kinds if isinstance(k, Sliding)}, "window"),
        "layer_types": [
            "full_attention" if isinstance(k, Global) else "sliding_attention" for k in kinds
        ],
        "attn_logit_softcapping": config.attn_logits_soft_cap,
        "final_logit_softcapping": config.final_logit_soft_cap,
    }


def hf_weights(params: Params, config: TransformerConfig) -> dict[str, np.ndarray]:
    """The official tree under the reference's names and in its (out, in) layout, float32.

    Norm weights keep their values: both sides multiply by 1 + weight.
    """
    tree = params

    def rows(w: Any, out_axes: int) -> np.ndarray:
        """w, its output axes first, as a matrix."""
        w = np.asarray(w, np.float32)
        return w.reshape(math.prod(w.shape[:out_axes]), -1)

    embedding = np.asarray(tree["embedder"]["input_embedding"], np.float32)
    flat = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding,
        "model.norm.weight": tree["final_norm"]["scale"],
    }
    for i in range(config.num_layers):
        layer, to = tree[f"layer_{i}"], f"model.layers.{i}."
        attn, mlp = layer["attn"], layer["mlp"]
        if "qkv_einsum" in attn:
            q, k, v = np.asarray(attn["qkv_einsum"]["w"])  # each (N, D, H)
        else:
            q, (k, v) = np.asarray(attn["q_einsum"]["w"]), np.asarray(attn["kv_einsum"]["w"])
        for name, w in {"q_proj": q, "k_proj": k, "v_proj": v}.items():
            flat[f"{to}self_attn.{name}.weight"] = rows(w.transpose(0, 2, 1), 2)  # (N, H), D
        out = np.asarray(attn["attn_vec_einsum"]["w"])  # (N, H, D)
        flat[f"{to}self_attn.o_proj.weight"] = rows(out.transpose(2, 0, 1), 1)  # D, (N, H)
        if config.use_qk_norm:
            flat[f"{to}self_attn.q_norm.weight"] = attn["_query_norm"]["scale"]
            flat[f"{to}self_attn.k_norm.weight"] = attn["_key_norm"]["scale"]
        gate, up = np.asarray(mlp["gating_einsum"])  # each (F, D), or (D, F) in the older models
        if not config.transpose_gating_einsum:
            gate, up = gate.T, up.T
        flat[f"{to}mlp.gate_proj.weight"] = gate
        flat[f"{to}mlp.up_proj.weight"] = up
        flat[f"{to}mlp.down_proj.weight"] = np.asarray(mlp["linear"]).T  # (F, D) -> D, F
        norms = _NORMS if config.use_post_attn_norm else _GEMMA1_NORMS
        for ours, theirs in norms.items():
            flat[f"{to}{theirs}.weight"] = layer[ours]["scale"]
    return {name: np.asarray(w, np.float32) for name, w in flat.items()}


_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Here the second norm follows attention only in the order of things: nothing else comes between.
_GEMMA1_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "pre_ffw_norm": "post_attention_layernorm",
}
_MODELS: dict[type, type[PreTrainedModel]] = {
    GemmaConfig: GemmaForCausalLM,
    Gemma2Config: Gemma2ForCausalLM,
    Gemma3TextConfig: Gemma3ForCausalLM,
}


def build(params: Params, config: TransformerConfig, attention: str = "eager") -> PreTrainedModel:
    """The reference model in float32, ready to run; `.double()` makes the float64 one."""
    theirs = hf_config(config, attention)
    model = _MODELS[type(theirs)](theirs)
    weights = {n: torch.tensor(w) for n, w in hf_weights(params, config).items()}
    model.load_state_dict(weights, strict=True)
    return model.eval()


def run(model: PreTrainedModel, tokens: np.ndarray) -> Result:
    """What the reference computes for (T,) tokens, in its own dtype."""
    ids = torch.tensor(tokens, dtype=torch.int64)[None]
    with torch.inference_mode():
        output = model(ids, output_attentions=True, use_cache=False)
    attention = np.stack([layer[0].numpy() for layer in output.attentions])
    return Result(output.logits[0].numpy(), attention)


@contextlib.contextmanager
def multiplied_by(times: Callable[[np.ndarray, np.ndarray], Any], seed: int) -> Iterator[None]:
    """Within it, linear layers in float32 are computed by `times`, their sums in a shuffled order.

    Another float32 run of the same formulas.  How much a product loses is its library's affair: on
    some processors torch's splits each sum over several accumulators, and is off by two thirds of
    what numpy's and XLA's are; on others numpy's does, too, and is off by half of what XLA's is.

    Args:
      times: a product of matrices, such as `np.matmul` and `jnp.matmul`.
      seed: of the order.
    """
    rng = np.random.default_rng(seed)
    orders: dict[int, np.ndarray] = {}
    original = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32 or self.bias is not None:
            raise ValueError(f"expected a float32 layer without bias, got {x.dtype}, {self}")
        order = orders.setdefault(x.shape[-1], rng.permutation(x.shape[-1]))
        rows, weight = x.detach().numpy(), self.weight.detach().numpy()
        product = np.array(times(rows[..., order], weight[:, order].T))
        return torch.from_numpy(product)

    torch.nn.Linear.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Linear.forward = original  # type: ignore[method-assign]
