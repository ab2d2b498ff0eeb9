"""Every capture site of Hugging Face's Gemma, by hooks around its modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from gemma_nb.config import TransformerConfig


class _Recorder:
    """What the hooks saw: site -> one array per layer, in the dtype of the model."""

    def __init__(self, model: PreTrainedModel, config: TransformerConfig) -> None:
        self.model, self.config = model, config
        self.seen: dict[str, dict[int, np.ndarray]] = {}
        self.handles: list[Any] = []
        self.calls = 0

    def keep(self, site: str, layer: int, value: torch.Tensor) -> None:
        self.seen.setdefault(site, {})[layer] = value.detach()[0].numpy().copy()

    def rms(self, site: str, layer: int, value: torch.Tensor) -> None:
        # The reference normalises in float32 even in its float64 run.
        square = value.detach().float().pow(2).mean(-1) + 1e-6
        self.keep(site, layer, square.sqrt())

    def after(self, module: torch.nn.Module, do: Callable[..., None]) -> None:
        """Calls `do(input, output)` after each call of the module."""

        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            do(given, output[0] if isinstance(output, tuple) else output)

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads * H) split."""
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)

    def watch(self) -> None:
        body = self.model.model
        self.after(body.norm, lambda x, y: self.keep("final", -1, y))
        self.after(body.norm, lambda x, y: self.rms("final_rms", -1, x))
        for i, layer in enumerate(body.layers):
            self._watch_layer(i, layer, layer.self_attn, layer.mlp)

    def _watch_layer(self, i: int, layer: Any, attn: Any, mlp: Any) -> None:
        c, keep = self.config, self.keep

        def norm(module: Any, site: str | None, scale: str) -> None:
            def do(x: torch.Tensor, y: torch.Tensor) -> None:
                self.rms(scale, i, x)
                if site is not None:
                    keep(site, i, y)

            self.after(module, do)

        self.after(layer, lambda x, y: (keep("residual_pre", i, x), keep("residual", i, y)))
        norm(layer.input_layernorm, "attn_in", "pre_attention_rms")
        if c.use_post_attn_norm:
            norm(layer.post_attention_layernorm, "attn_out", "post_attention_rms")
            norm(layer.post_feedforward_layernorm, "mlp_out", "post_ffw_rms")
            before_mlp = layer.pre_feedforward_layernorm
        else:
            self.after(attn.o_proj, lambda x, y: keep("attn_out", i, y))
            self.after(mlp, lambda x, y: keep("mlp_out", i, y))
            before_mlp = layer.post_attention_layernorm
        norm(before_mlp, "mlp_in", "pre_ffw_rms")
        self.after(before_mlp, lambda x, y: keep("residual_mid", i, x))
        if c.use_qk_norm:
            # (B, heads, T, H), and their scales
            self.after(attn.q_norm, lambda x, y: self._per_head("query_rms", i, x))
            self.after(attn.k_norm, lambda x, y: self._per_head("key_rms", i, x))
        self.after(attn.v_proj, lambda x, y: keep("v", i, self.heads(y)))
        self.after(attn.o_proj, lambda x, y: (keep("z", i, self.heads(x)), keep("attn_raw", i, y)))
        self.after(mlp.gate_proj, lambda x, y: keep("mlp_gate", i, y))
        self.after(mlp.up_proj, lambda x, y: keep("mlp_up", i, y))
        self.after(mlp.down_proj, lambda x, y: (keep("mlp_hidden", i, x), keep("mlp_raw", i, y)))

    def _per_head(self, site: str, layer: int, x: torch.Tensor) -> None:
        in_front = x.shape[1] in (self.config.num_heads, self.config.num_kv_heads)
        self.rms(site, layer, x.transpose(1, 2) if in_front and x.shape[2] > 64 else x)

    def rope(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around the reference's rotation: once per layer, in order; arrays (B, heads, T, H)."""

        def rotate(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            layer, self.calls = self.calls, self.calls + 1
            rotated = original(q, k, *args, **kwargs)
            self.keep("q_pre", layer, q.transpose(1, 2))
            self.keep("k_pre", layer, k.transpose(1, 2))
            # The reference scales scores, ours scales queries.
            self.keep("q", layer, rotated[0].transpose(1, 2) * self.config.query_scale)
            self.keep("k", layer, rotated[1].transpose(1, 2))
            return rotated

        return rotate


def capture(
    model: PreTrainedModel, config: TransformerConfig, tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """Site -> (layers, T, ...) or (T, ...), maps (layers, N, T, S), for (T,) tokens."""
    recorder = _Recorder(model, config)
    recorder.watch()
    theirs = sys.modules[type(model.model).__module__]
    original = theirs.apply_rotary_pos_emb
    theirs.apply_rotary_pos_emb = recorder.rope(original)
    try:
        with torch.inference_mode():
            ids = torch.tensor(tokens, dtype=torch.int64)[None]
            output = model(ids, output_attentions=True, use_cache=False)
    finally:
        theirs.apply_rotary_pos_emb = original
        for handle in recorder.handles:
            handle.remove()
    layers = range(config.num_layers)
    found = {
        site: values[-1] if -1 in values else np.stack([values[i] for i in layers])
        for site, values in recorder.seen.items()
    }
    found["embed"] = found["residual_pre"][0]
    found["attention"] = np.stack([layer[0].numpy() for layer in output.attentions])
    found["logits"] = output.logits[0].numpy()
    return found
