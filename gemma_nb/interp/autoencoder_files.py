"""Files of sparse autoencoders and transcoders: Gemma Scope, Gemma Scope 2 and SAELens.

An autoencoder is an .npz (Gemma Scope) or a .safetensors file.  Gemma Scope 2 has `config.json`
beside it, SAELens `cfg.json`; they say what kind it is, how its input is prepared and where it was
trained.  What SAELens does to the output by decoder norms or a scaling factor is folded into the
weights here, as it does itself before publishing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_nb.checkpoints import kinds

_CONFIGS = ("cfg.json", "config.json")
_ENDINGS = (".npz", ".safetensors")
# Ways of writing the kinds that are read: name in small letters -> ours.
_KINDS: Mapping[str, str] = {
    "standard": "relu",
    "relu": "relu",
    "jumprelu": "jumprelu",
    "jump_relu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
# Spelling in a file, in small letters -> ours.
_NAMES: Mapping[str, str] = {"affine_skip_connection": "skip", "topk_threshold": "threshold"}


@dataclasses.dataclass
class AutoencoderFile:
    """An autoencoder's arrays and configuration as they were read.

    Attributes:
      name: of the file, for errors.
      found: its arrays, by name in small letters.
      config: what its configuration says; empty where there is none.
      source: the configuration's file name.
      is_transcoder: whether it predicts another site than it reads.
      kind: "relu", "jumprelu", "gated", "topk" or "batchtopk".
      settings: fields of `SparseAutoencoder` that are no arrays and no place.
    """

    name: str
    found: dict[str, np.ndarray]
    config: Mapping[str, Any]
    source: str
    is_transcoder: bool
    kind: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def refuse_other_kind(self, *, transcoder: bool) -> AutoencoderFile:
        """The file; raises ValueError for a transcoder where none is wanted, and the reverse."""
        if self.is_transcoder != transcoder:
            here = (
                "a transcoder: it predicts another site than it reads"
                if self.is_transcoder
                else ("an autoencoder of one site")
            )
            wanted = "Transcoder" if self.is_transcoder else "SparseAutoencoder"
            raise ValueError(f"{self.name} is {here}; load it with gnb.{wanted}.load")
        return self

    def arrays(self) -> dict[str, Any]:
        """Fields of `SparseAutoencoder` that are arrays, float32.

        Raises:
          ValueError: one is missing or of another shape.
        """
        found: dict[str, Any] = {n: a.astype(np.float32, copy=False) for n, a in self.found.items()}
        if self.kind == "gated":
            self._need(found, "b_gate", "b_mag", "r_mag")
            found["b_enc"] = found["b_mag"]
        self._need(found, "w_enc", "b_enc", "w_dec", "b_dec")
        width, count = found["w_enc"].shape if found["w_enc"].ndim == 2 else (-1, -1)
        width_out = width if not self.is_transcoder else found["b_dec"].size
        if not self.is_transcoder:
            width, count, width_out = found["b_dec"].size, found["b_enc"].size, found["b_dec"].size
        shapes = {
            "w_enc": (width, count),
            "w_dec": (count, width_out),
            "b_enc": (count,),
            "b_dec": (width_out,),
        }
        if self.kind in ("jumprelu", "batchtopk"):
            if self.kind == "batchtopk" or self.config:
                self._need(found, "threshold")
            threshold = found.get("threshold", np.zeros(count))
            scalar = threshold.size == 1
            found["threshold"] = np.full(count, threshold) if scalar else threshold
        else:
            found["threshold"] = np.zeros(count)
        shapes["threshold"] = (count,)
        if self.kind == "gated":
            shapes |= {"r_mag": (count,), "b_gate": (count,)}
        if "w_skip" in found:  # SAELens keeps it as (output, input)
            found["skip"] = found["w_skip"].T
        if "skip" in found:
            shapes["skip"] = (width, width_out)
        for name, shape in shapes.items():
            if found[name].shape != shape:
                raise ValueError(
                    f"{self.name}: {name} is {found[name].shape}, expected {shape} for {count} "
                    f"features of width {width}"
                )
        self._fold(found)
        used = {n: jnp.asarray(found[n], jnp.float32) for n in shapes if n not in _GATE}
        if self.kind == "gated":
            used["gate"] = jnp.asarray(np.stack([found[n] for n in _GATE]), jnp.float32)
        return used

    def _need(self, found: Mapping[str, Any], *names: str) -> None:
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"{self.name} holds {', '.join(sorted(self.found))} and lacks "
                f"{', '.join(sorted(missing))}"
            )

    def _fold(self, found: dict[str, np.ndarray]) -> None:
        """Puts decoder norms and scaling factors into the weights: the same function."""
        if self.config.get("rescale_acts_by_decoder_norm"):
            norms = np.linalg.norm(found["w_dec"].astype(np.float64), axis=-1)
            found["w_enc"], found["b_enc"] = found["w_enc"] * norms, found["b_enc"] * norms
            found["w_dec"] = found["w_dec"] / norms[:, None]
        scaling = next(
            (found[n] for n in ("scaling_factor", "finetuning_scaling_factor") if n in found), None
        )
        if scaling is None or np.allclose(scaling, 1):
            return
        if not self.config.get("finetuning_scaling_factor"):
            raise ValueError(
                f"{self.name} holds a scaling_factor, and {self.source or 'no configuration'} says "
                "that it is used (finetuning_scaling_factor)"
            )
        found["w_dec"] = found["w_dec"] * scaling[:, None]


_GATE = ("r_mag", "b_gate")
_SCOPE = re.compile(r"gemma-scope.*transcoder")


def read(path: str | os.PathLike[str]) -> AutoencoderFile:
    """Reads a file, or the one in a folder, and the configuration beside it.

    Raises:
      ValueError: as of `SparseAutoencoder.load`.
      FileNotFoundError: it is not there.
    """
    path = _file(Path(path))
    found = _arrays(path)
    found = {_NAMES.get(name, name): array for name, array in found.items()}
    config, source = _config(path.parent)
    named = str(config.get("architecture") or "").lower()
    if named and named not in _KINDS:
        raise ValueError(
            f"{source}: the architecture {named!r} is not known here; known are {', '.join(_KINDS)}"
        )
    kind = _KINDS.get(named, "jumprelu" if not config else "relu")
    if not named and config and "threshold" in found:
        kind = "jumprelu"
    if not named and "r_mag" in found:
        kind = "gated"
    kind, settings = _settings(config, source, kind, found)
    outs = ("hook_name_out", "hf_hook_point_out", "hook_point_out")
    ins = ("hook_name", "hook_point", "hf_hook_point_in", "hook_point_in")
    there = [next((config[k] for k in keys if config.get(k)), None) for keys in (ins, outs)]
    is_transcoder = (
        "transcoder" in named
        or str(config.get("type") or "") == "transcoder"
        or "skip" in found
        or "w_skip" in found
        or (there[1] is not None and there[1] != there[0])
        # Gemma Scope's own folders are all that tells.
        or (not config and any(_SCOPE.search(part.lower()) for part in path.absolute().parts))
    )
    if str(config.get("type") or "sae") not in ("sae", "transcoder"):
        raise ValueError(f"{source}: a {config['type']} is not known here")
    if is_transcoder:
        settings["subtracts_b_dec"] = False  # b_dec is of the output
        if settings.get("normalises", "none") != "none":
            raise ValueError(f"{source}: a transcoder with normalize_activations is not known here")
    return AutoencoderFile(path.name, found, config, source, is_transcoder, kind, settings)


def _settings(
    config: Mapping[str, Any], source: str, kind: str, found: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The kind, and how the input is prepared."""
    if source != "cfg.json":
        return kind, {}
    settings: dict[str, Any] = {"subtracts_b_dec": config.get("apply_b_dec_to_input", True) is True}
    normalises = config.get("normalize_activations") or "none"
    if normalises in (True, "expected_average_only_in"):
        warnings.warn(
            f"{source}: this autoencoder was trained on inputs scaled to an average norm of "
            "sqrt(D), by a factor that the file does not hold.  It is computed without one, as "
            "SAELens does with a file; if the factor is not folded into the weights, scale the "
            "input",
            UserWarning,
            stacklevel=4,
        )
        normalises = "none"
    known = ("none", "constant_norm_rescale", "layer_norm")
    if normalises not in known:
        raise ValueError(
            f"{source}: normalize_activations is {normalises!r}; known are {', '.join(known)} and "
            "expected_average_only_in"
        )
    settings["normalises"] = normalises
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    options = config.get("activation_fn_kwargs") or {}
    if activation == "topk" and kind == "relu":
        kind = "topk"
    elif activation not in ("relu", "topk"):
        raise ValueError(f"{source}: the activation function {activation!r} is not known here")
    if kind == "topk":
        k = config.get("k") or options.get("k")
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"{source}: a top-k autoencoder needs k, got {k!r}")
        settings["k"] = k
    if kind == "batchtopk" and "threshold" not in found:
        raise ValueError(
            f"{source}: a batch top-k autoencoder chooses among all features of a batch; on a text "
            "it needs the threshold that SAELens saves it with (architecture jumprelu)"
        )
    return kind, settings


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    """The configuration in a folder, flat, and its file name; ({}, "") where there is none."""
    for name in _CONFIGS:
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / name} cannot be read: {error}") from error
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder / name} is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{folder / name}: expected an object, got {found!r:.40}")
        nested = [found.get(key) for key in ("metadata", "meta")]
        flat = {k: v for part in nested if isinstance(part, dict) for k, v in part.items()}
        ours = {"architecture", "hook_name", "hook_point", "hf_hook_point_in", "hook_point_in"}
        if name == "config.json" and not ours & set({**flat, **found}):
            continue  # of something else
        return {**flat, **{k: v for k, v in found.items() if v is not None}}, name
    return {}, ""


def _file(path: Path) -> Path:
    """The file that is meant; raises as `SparseAutoencoder.load` says."""
    if path.is_dir():
        names = [p for p in sorted(path.iterdir()) if p.suffix in _ENDINGS]
        # SAELens and Gemma Scope 2 keep other arrays beside the weights.
        known = [p for p in names if p.stem in ("sae_weights", "params")]
        if len(known or names) != 1:
            raise ValueError(
                f"{path} holds {len(names)} .npz and .safetensors files; pass the path of one"
            )
        return (known or names)[0]
    if path.suffix not in _ENDINGS:
        raise ValueError(
            f"expected a .npz or .safetensors file, or a folder with one, got {path.name!r}"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    return path


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a file by name in small letters; raises ValueError where it cannot be read."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as opened:
                return {name.lower(): opened[name] for name in opened.files}
        from safetensors.numpy import load_file

        return {name.lower(): value for name, value in load_file(path).items()}
    except Exception as error:  # each way of being broken has its own
        problem = kinds.in_place_of(path) or error
        raise ValueError(f"{path.name} cannot be read as a file of arrays: {problem}") from error
