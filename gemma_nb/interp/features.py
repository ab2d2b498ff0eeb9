"""Neurons and learned features: what they respond to, in the user's own texts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemma_nb.executables import pinned
from gemma_nb.interp.sizes import Indices, check_positions
from gemma_nb.interp.trace import Trace, trace
from gemma_nb.interventions import Steer
from gemma_nb.interventions.base import lines_of
from gemma_nb.interventions.numbers import room
from gemma_nb.model import GemmaTransformer
from gemma_nb.sites import check_layers, site_of
from gemma_nb.summaries import summary
from gemma_nb.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xarray

    from gemma_nb.interventions.base import Positions

_CONTEXT = 12  # tokens shown before an activating token, and half as many behind it


@pinned
def top_activations(
    model: GemmaTransformer,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    layer: int,
    neuron: int,
    k: int = 10,
    *,
    site: str = "mlp_hidden",
) -> xarray.Dataset:
    """The tokens of some texts at which a neuron is most active.

    What it does not mean: the strongest examples are not the typical ones, and these texts are not
    all texts; many neurons respond to several unrelated things (arXiv:2209.10652).

    Args:
      model: whose neuron.
      tokenizer: of the model.
      texts: where to look.
      layer: the neuron's.
      neuron: its index along the site's last axis.
      k: how many tokens, at most.
      site: mlp_hidden for neurons; any site of one vector per position.

    Returns:
      activation, text, position, token, token_id and context (rank), the strongest first.

    Raises:
      ValueError: an unknown layer, neuron or site, or no text.
    """
    found = site_of(model, site)
    if len(found.dims) != 3 or not found.per_layer:
        raise ValueError(f"neurons are looked for in sites of one vector per position, not {site}")
    width = {"F": model.config.hidden_dim, "D": model.config.embed_dim}.get(found.dims[2], 0)
    if not 0 <= neuron < width:
        raise ValueError(f"neuron {neuron} does not exist: {site} has 0 to {width - 1}")
    check_layers(layer, model.config.num_layers)
    what: dict[str, int | str] = {"layer": layer, "neuron": neuron, "site": site}
    return _strongest(
        *(model, tokenizer, texts, k, what),
        lambda traced: traced.get(site, layer).values[0][:, neuron],
    )


def _strongest(
    model: GemmaTransformer,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    k: int,
    what: dict[str, int | str],
    activations: Callable[[Trace], np.ndarray],
) -> xarray.Dataset:
    import xarray

    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    texts = [texts] if isinstance(texts, str) else texts
    best: list[tuple[float, int, int, int, str]] = []
    for number, text in enumerate(texts):
        traced = trace(model, text, tokenizer=tokenizer, sites=())
        values = activations(traced)
        for p in np.argsort(-values, kind="stable")[:k].tolist():
            around = traced.tokens[max(0, p - _CONTEXT) : p + _CONTEXT // 2 + 1].tolist()
            context = tokenizer.decode(around)
            best.append((float(values[p]), number, p, int(traced.tokens[p]), context))
        best = sorted(best, key=lambda row: -row[0])[:k]
    if not best:
        raise ValueError("texts is empty: pass at least one text")
    strengths, numbers, positions, ids, contexts = zip(*best, strict=True)
    columns = {
        "activation": np.array(strengths, np.float32),
        "text": np.array(numbers),
        "position": np.array(positions),
        "token_id": np.array(ids, np.int32),
        "token": [tokenizer.token_text(i) for i in ids],
        "context": list(contexts),
    }
    return xarray.Dataset(
        {name: ("rank", values) for name, values in columns.items()},
        coords={"rank": np.arange(len(best))},
        attrs={"model": model.title, "interventions": lines_of(model.interventions), **what},
    )


@flax.struct.dataclass
class SparseAutoencoder:
    """A JumpReLU sparse autoencoder of one site, as Gemma Scope publishes them.

        f = pre * (pre > threshold), pre = x W_enc + b_enc;  x' = f W_dec + b_dec

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435; Lieberum et al. 2024 (Gemma Scope),
    arXiv:2408.05147.

    What it does not mean: features are what this autoencoder found useful to rebuild x from; what
    it leaves out is in x - x', and a feature's name is a guess from examples.

    Attributes:
      w_enc: (D, features) float32.
      b_enc: (features,).
      w_dec: (features, D).
      b_dec: (D,).
      threshold: (features,); zeros make it a plain ReLU.
      layer: where it was trained.
      site: at which site.
    """

    w_enc: Float[Array, "D features"]
    b_enc: Float[Array, " features"]
    w_dec: Float[Array, "features D"]
    b_dec: Float[Array, " D"]
    threshold: Float[Array, " features"]
    layer: int = flax.struct.field(pytree_node=False)
    site: str = flax.struct.field(pytree_node=False, default="residual")

    __repr__ = summary

    @classmethod
    @pinned
    def load(
        cls, path: str | os.PathLike[str], *, layer: int, site: str = "residual"
    ) -> SparseAutoencoder:
        """Reads an .npz (Gemma Scope's `params.npz`) or .safetensors file.

        Args:
          path: the file; its arrays are W_enc, b_enc, W_dec, b_dec and threshold, in any case.
          layer: the layer it was trained on.
          site: the site that it was trained on, of the width of the residual stream.

        Raises:
          ValueError: another ending, a file that cannot be read, or an array that is missing or of
            a shape that does not fit.
          FileNotFoundError: it is not there.
        """
        path = Path(path)
        arrays = _arrays(path)
        missing = {"w_enc", "b_enc", "w_dec", "b_dec"} - set(arrays)
        if missing:
            raise ValueError(
                f"{path.name} holds {', '.join(sorted(arrays))} and lacks "
                f"{', '.join(sorted(missing))}"
            )
        arrays.setdefault("threshold", np.zeros_like(arrays["b_enc"]))
        width, count = arrays["b_dec"].size, arrays["b_enc"].size
        expected = {
            "w_enc": (width, count),
            "w_dec": (count, width),
            "b_enc": (count,),
            "b_dec": (width,),
            "threshold": (count,),
        }
        for name, shape in expected.items():
            if arrays[name].shape != shape:
                raise ValueError(
                    f"{path.name}: {name} is {arrays[name].shape}, expected {shape} for {count} "
                    f"features of width {width}"
                )
        used = {name: jnp.asarray(arrays[name], jnp.float32) for name in expected}
        return cls(**used, layer=layer, site=site)

    @property
    def num_features(self) -> int:
        """How many there are."""
        return int(self.b_enc.shape[0])

    @pinned
    def encode(self, x: Float[Array | np.ndarray, "*lead D"]) -> Float[Array, "*lead features"]:
        """Feature activations."""
        # Not `jnp.asarray`, which is a program for each shape.
        held = x.astype(jnp.float32) if isinstance(x, jax.Array) else np.asarray(x, np.float32)
        return _encode(self, held)

    @pinned
    def decode(self, features: Float[Array, "*lead features"]) -> Float[Array, "*lead D"]:
        """What is rebuilt from them."""
        return features @ self.w_dec + self.b_dec

    @pinned
    def features(self, trace: Trace, positions: Indices = None) -> xarray.DataArray:
        """(position, feature) activations on a traced text.

        Raises:
          ValueError: a model of another width, or an unknown layer.
        """
        at = check_positions(positions, len(trace.tokens))
        values = self._of(self._seen(trace, at))
        attrs = {"layer": self.layer, "site": self.site}
        dims = ("position", "feature")
        return trace.labels_of.array(values, dims, "features", attrs, positions=at)

    @pinned
    def top_features(self, trace: Trace, k: int = 10, positions: Indices = None) -> xarray.Dataset:
        """The most active features at each position: feature and activation (position, rank)."""
        at = check_positions(positions, len(trace.tokens))
        seen, count = self._seen(trace, at), min(k, self.num_features)
        best = _best(self, _padded(seen), min(room(count), self.num_features))
        values, which = (np.asarray(x)[: len(seen), :count] for x in best)
        dims = ("position", "rank")
        data = {"feature": (dims, which), "activation": (dims, values)}
        attrs = {"layer": self.layer, "site": self.site}
        return trace.labels_of.dataset(data, attrs, positions=at)

    @pinned
    def unexplained(self, trace: Trace) -> float:
        """Share of the variance over positions (but the first) that is not rebuilt."""
        x = jnp.asarray(self._seen(trace, tuple(range(1, len(trace.tokens)))))
        error = jnp.square(x - self.decode(self.encode(x))).sum()
        return float(error / jnp.square(x - x.mean(axis=0)).sum())

    def top_activations(
        self,
        model: GemmaTransformer,
        tokenizer: Tokenizer,
        texts: Iterable[str],
        feature: int,
        k: int = 10,
    ) -> xarray.Dataset:
        """As `gnb.top_activations`, of a feature."""
        self._check(feature)
        one = dataclasses.replace(
            self,
            w_enc=self.w_enc[:, feature : feature + 1],
            b_enc=self.b_enc[feature : feature + 1],
            threshold=self.threshold[feature : feature + 1],
        )
        what: dict[str, int | str] = {"layer": self.layer, "feature": feature, "site": self.site}
        return _strongest(
            *(model, tokenizer, texts, k, what),
            lambda traced: one._of(self._seen(traced, None))[:, 0],
        )

    @pinned
    def steer(self, feature: int, scale: float, *, positions: Positions = None) -> Steer:
        """Adds `scale` times the feature's decoder row where the autoencoder was trained."""
        self._check(feature)
        return Steer(self.layer, self.w_dec[feature], scale, positions=positions, site=self.site)

    def _check(self, feature: int) -> None:
        if not 0 <= feature < self.num_features:
            raise ValueError(
                f"feature {feature} does not exist: there are 0 to {self.num_features - 1}"
            )

    def _of(self, seen: np.ndarray) -> np.ndarray:
        """(T, features) activations of what was seen, (T, D)."""
        return np.asarray(self.encode(_padded(seen)))[: len(seen)]

    def _seen(self, trace: Trace, positions: tuple[int, ...] | None) -> np.ndarray:
        """(T, D) of the site."""
        values = trace.get(self.site, self.layer, positions).values[0]
        if values.shape[-1] != self.b_dec.shape[0]:
            raise ValueError(
                f"this autoencoder reads vectors of {self.b_dec.shape[0]} numbers, "
                f"{self.site} has {values.shape[-1]}"
            )
        return values


def _padded(seen: np.ndarray) -> np.ndarray:
    """(T, D) with more rows, so that few counts of them are compiled."""
    return np.pad(seen, ((0, room(len(seen)) - len(seen)), (0, 0)))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """What a file holds, by name in small letters; raises ValueError as `load` says."""
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"expected a .npz or .safetensors file, got {path.name!r}")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as opened:
                return {name.lower(): opened[name] for name in opened.files}
        from safetensors.numpy import load_file

        return {name.lower(): value for name, value in load_file(path).items()}
    except Exception as error:  # each way of being broken has its own
        raise ValueError(f"{path.name} cannot be read as a file of arrays: {error}") from error


@jax.jit
def _encode(sae: SparseAutoencoder, x: jax.Array) -> jax.Array:
    pre = x @ sae.w_enc + sae.b_enc
    return jnp.where(pre > sae.threshold, jax.nn.relu(pre), 0.0)


# Static: how many.
@jax.jit(static_argnums=2)
def _best(sae: SparseAutoencoder, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    values, which = jax.lax.top_k(_encode(sae, x), k)
    return values, which
