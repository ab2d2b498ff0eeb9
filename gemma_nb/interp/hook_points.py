"""Hook points: where SAELens and Gemma Scope 2 say that an autoencoder was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gemma_nb.indices import number
from gemma_nb.interp.autoencoder_files import AutoencoderFile
from gemma_nb.sites import canonical
from gemma_nb.sites import site as site_called

# What SAELens (TransformerLens) calls a place in a block -> our site, and what divides it.
_BLOCK: Mapping[str, tuple[str, str]] = {
    "hook_resid_pre": ("residual_pre", ""),
    "hook_resid_mid": ("residual_mid", ""),
    "hook_resid_post": ("residual", ""),
    "hook_attn_out": ("attn_out", ""),
    "hook_mlp_out": ("mlp_out", ""),
    "hook_mlp_in": ("residual_mid", ""),  # read before the norm
    "hook_attn_in": ("residual_pre", ""),
    "attn.hook_z": ("z", ""),
    "attn.hook_v": ("v", ""),
    "mlp.hook_pre": ("mlp_gate", ""),
    "mlp.hook_pre_linear": ("mlp_up", ""),
    "mlp.hook_post": ("mlp_hidden", ""),
    # After the division by the norm, before its weight.
    "ln1.hook_normalized": ("residual_pre", "pre_attention_rms"),
    "ln2.hook_normalized": ("residual_mid", "pre_ffw_rms"),
    # Modules as transformers names them in Gemma 2 and 3, as Gemma Scope 2 does.
    "input": ("residual_pre", ""),
    "output": ("residual", ""),
    "input_layernorm.output": ("attn_in", ""),
    "self_attn.o_proj.input": ("z", ""),
    "self_attn.o_proj.output": ("attn_raw", ""),
    "self_attn.output": ("attn_raw", ""),
    "post_attention_layernorm.output": ("attn_out", ""),
    "pre_feedforward_layernorm.output": ("mlp_in", ""),
    "mlp.input": ("mlp_in", ""),
    "mlp.down_proj.input": ("mlp_hidden", ""),
    "mlp.down_proj.output": ("mlp_raw", ""),
    "mlp.output": ("mlp_raw", ""),
    "post_feedforward_layernorm.output": ("mlp_out", ""),
}
_ONCE: Mapping[str, str] = {"hook_embed": "embed", "ln_final.hook_normalized": ""}
_PLACE = re.compile(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.(.+)$")


def place(
    file: AutoencoderFile, layer: int | None, site: str | None, site_out: str | None = None
) -> dict[str, Any]:
    """Fields of an autoencoder that say where it was trained, by its configuration or as given.

    Raises:
      ValueError: what is given contradicts the configuration, or there is no layer.
    """
    layer = None if layer is None else number(layer, "layer", "layer")
    site = None if site is None else canonical(site)
    site_out = None if site_out is None else canonical(site_out)
    read = _read_place(file, "hook_name", "hook_point", "hf_hook_point_in", "hook_point_in")
    if file.is_transcoder:
        out = _read_place(file, "hook_name_out", "hf_hook_point_out", "hook_point_out")
        if out:
            _agree(file, "site_out", site_out, out[1])
        if out and read and out[0] != read[0]:
            raise ValueError(
                f"{file.source}: it reads layer {read[0]} and predicts layer {out[0]}; only "
                "transcoders of one layer are known here"
            )
        default_out = site_out or (out[1] if out else "mlp_out")
    given: dict[str, Any] = (
        {} if read is None else {"layer": read[0], "site": read[1], "divided_by": read[2]}
    )
    if read is not None:
        _agree(file, "layer", layer, read[0])
        _agree(file, "site", site, read[1] if not read[2] else f"{read[1]} / {read[2]}")
    else:
        default = "mlp_in" if file.is_transcoder else "residual"
        given = {"layer": layer, "site": site or default}
        if layer is None and site_called(given["site"]).per_layer:
            raise ValueError(
                f"{file.name} does not say where it was trained: pass layer=, and site= where "
                f"it is not {default}"
            )
    for name in (given["site"], *([default_out] if file.is_transcoder else [])):
        if site_called(name).is_map:
            raise ValueError(f"{name} is a map: an autoencoder reads one vector per position")
    return {**given, "site_out": default_out} if file.is_transcoder else given


def _agree(file: AutoencoderFile, what: str, given: Any, read: Any) -> None:
    if given is not None and given != read:
        raise ValueError(
            f"{file.source} says that {file.name} was trained at {what} {read!r}, and "
            f"{what}={given!r} was given: leave it out"
        )


def _read_place(file: AutoencoderFile, *keys: str) -> tuple[int | None, str, str] | None:
    """(layer, site, what divides it) by the configuration; None where it does not say."""
    hook = next((file.config[key] for key in keys if file.config.get(key)), None)
    if hook is None:
        return None
    if not isinstance(hook, str):
        raise ValueError(
            f"{file.source}: it reads or predicts several places ({hook!r:.60}), as "
            "crosscoders do, which are not known here"
        )
    if _ONCE.get(hook):
        return None, _ONCE[hook], ""
    found = _PLACE.search(hook)
    if found is None or found[2] not in _BLOCK:
        raise ValueError(
            f"{file.source}: the hook point {hook!r} is no site that is known here; those of a "
            f"layer are {', '.join(_BLOCK)}"
        )
    layer = int(found[1])
    said = file.config.get("hook_layer")
    if isinstance(said, int) and said != layer and "out" not in keys[0]:
        raise ValueError(f"{file.source}: hook point {hook!r} is not in hook_layer {said}")
    if file.config.get("hook_head_index") is not None:
        raise ValueError(
            f"{file.source}: it reads a single head (hook_head_index "
            f"{file.config['hook_head_index']}), which is not known here"
        )
    return (layer, *_BLOCK[found[2]])
