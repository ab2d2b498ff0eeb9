"""Learned features: sparse autoencoders and transcoders, and what they respond to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemma_nb.executables import pinned
from gemma_nb.indices import Index, Indices, one
from gemma_nb.interp import autoencoder_files as files
from gemma_nb.interp import hook_points
from gemma_nb.interp.features import strongest
from gemma_nb.interp.sizes import check_positions
from gemma_nb.interp.trace import Trace
from gemma_nb.interventions import Steer
from gemma_nb.interventions.numbers import room
from gemma_nb.model import GemmaTransformer
from gemma_nb.summaries import summary
from gemma_nb.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xarray

    from gemma_nb.interventions.positions import Positions

_Self = TypeVar("_Self", bound="SparseAutoencoder")


@flax.struct.dataclass
class SparseAutoencoder:
    """A sparse autoencoder of one site, as Gemma Scope and SAELens publish them.

        f = pre * (pre > threshold), pre = x W_enc + b_enc;  x' = f W_dec + b_dec

    That is a JumpReLU autoencoder; with thresholds of zero it is a plain ReLU.  Others differ as
    their attributes say.  Source: Rajamanoharan et al. 2024, arXiv:2407.14435 (JumpReLU) and
    arXiv:2404.16014 (gated); Gao et al. 2024, arXiv:2406.04093 (top-k); Lieberum et al. 2024 (Gemma
    Scope), arXiv:2408.05147.  The formulas of all kinds are those that SAELens computes.

    What it does not mean: features are what this autoencoder found useful to rebuild x from; what
    it leaves out is in x - x', and a feature's name is a guess from examples.

    Attributes:
      w_enc: (D, features) float32.
      b_enc: (features,).
      w_dec: (features, D).
      b_dec: (D,).
      threshold: (features,); zeros make it a plain ReLU.
      layer: where it was trained; None at a site that the model has once.
      site: at which site.  Of z and other sites with heads, x is all heads side by side.
      divided_by: the site of a norm's scale that x is divided by; "" for none.
      subtracts_b_dec: whether b_dec is taken from x before it is encoded.
      normalises: how x is normalised before that: "constant_norm_rescale" gives it the norm
        sqrt(D), "layer_norm" mean 0 and standard deviation 1.
      k: only the k largest of a position's features are on; None for all that pass.
      gate: (2, features) r_mag and b_gate of a gated autoencoder, None of others: pre is then
        x (W_enc exp(r_mag)) + b_enc, on where x W_enc + b_gate > 0.
    """

    w_enc: Float[Array, "D features"]
    b_enc: Float[Array, " features"]
    w_dec: Float[Array, "features D"]
    b_dec: Float[Array, " D"]
    threshold: Float[Array, " features"]
    layer: int | None = flax.struct.field(pytree_node=False)
    site: str = flax.struct.field(pytree_node=False, default="residual")
    divided_by: str = flax.struct.field(pytree_node=False, default="")
    subtracts_b_dec: bool = flax.struct.field(pytree_node=False, default=False)
    normalises: Literal["none", "constant_norm_rescale", "layer_norm"] = flax.struct.field(
        pytree_node=False, default="none"
    )
    k: int | None = flax.struct.field(pytree_node=False, default=None)
    gate: Float[Array, "2 features"] | None = None

    __repr__ = summary

    @classmethod
    @pinned
    def load(
        cls: type[_Self],
        path: str | os.PathLike[str],
        *,
        layer: int | None = None,
        site: str | None = None,
    ) -> _Self:
        """Reads a folder or file of Gemma Scope (1 and 2) or of SAELens.

        The configuration beside the arrays is read where there is one, `cfg.json` of SAELens and
        `config.json` of Gemma Scope 2: what kind it is, how its input is prepared, and where it was
        trained.

        Args:
          path: an .npz or .safetensors file with W_enc, b_enc, W_dec, b_dec and what belongs to
            its kind, in any case; or the folder that holds one.
          layer: the layer it was trained on; None takes the configuration's.
          site: the site that it was trained on; None takes the configuration's, or else the
            residual stream after the layer.

        Raises:
          ValueError: another ending; a file that cannot be read; an array that is missing or of a
            shape that does not fit; a layer or site that is not the configuration's, or none at
            all; a transcoder (see `Transcoder`), or a kind that is not known here.
          FileNotFoundError: it is not there.
        """
        read = files.read(path)
        place = hook_points.place(read.refuse_other_kind(transcoder=False), layer, site)
        return cls(**read.arrays(), **read.settings, **place)

    @property
    def num_features(self) -> int:
        """Number of features."""
        return int(self.b_enc.shape[0])

    @pinned
    def encode(self, x: Float[Array | np.ndarray, "*lead D"]) -> Float[Array, "*lead features"]:
        """Feature activations."""
        return _encode(self, _float32(x))

    @pinned
    def decode(self, features: Float[Array, "*lead features"]) -> Float[Array, "*lead D"]:
        """Inputs rebuilt from features.

        Raises:
          ValueError: more than the features is needed, see `reconstruct`.
        """
        if self.normalises != "none":
            raise ValueError(
                f"this autoencoder normalises its input ({self.normalises}), and what it rebuilds "
                "is scaled back by the input's own size: call reconstruct(x)"
            )
        return features @ self.w_dec + self.b_dec

    @pinned
    def reconstruct(self, x: Float[Array | np.ndarray, "*lead D"]) -> Float[Array, "*lead D"]:
        """`x` encoded, and decoded again."""
        return _reconstruct(self, _float32(x))

    @pinned
    def features(self, trace: Trace, positions: Indices = None) -> xarray.DataArray:
        """(position, feature) activations on a traced text.

        Raises:
          ValueError: a model of another width, or an unknown layer.
        """
        at = check_positions(positions, len(trace.tokens))
        seen = self._seen(trace, at)
        values = np.asarray(_encode(self, _padded(seen)))[: len(seen)]
        dims = ("position", "feature")
        return trace.labels_of.array(values, dims, "features", self._attrs(), positions=at)

    @pinned
    def top_features(self, trace: Trace, k: int = 10, positions: Indices = None) -> xarray.Dataset:
        """The most active features at each position: feature and activation (position, rank)."""
        at = check_positions(positions, len(trace.tokens))
        seen, count = self._seen(trace, at), min(k, self.num_features)
        best = _best(self, _padded(seen), min(room(count), self.num_features))
        values, which = (np.asarray(x)[: len(seen), :count] for x in best)
        dims = ("position", "rank")
        data = {"feature": (dims, which), "activation": (dims, values)}
        return trace.labels_of.dataset(data, self._attrs(), positions=at)

    @pinned
    def unexplained(self, trace: Trace) -> float:
        """Share of the variance over positions (but the first) that is not rebuilt."""
        rest = tuple(range(1, len(trace.tokens)))
        x, wanted = self._seen(trace, rest), self._wanted(trace, rest)
        rebuilt = np.asarray(self.reconstruct(_padded(x)))[: len(x)]
        error = np.square(wanted - rebuilt).sum()
        return float(error / np.square(wanted - wanted.mean(axis=0)).sum())

    def top_activations(
        self,
        model: GemmaTransformer,
        tokenizer: Tokenizer,
        texts: Iterable[Any],
        feature: int,
        k: int = 10,
        *,
        include_first: bool = False,
    ) -> xarray.Dataset:
        """Top activations of a feature (see `gnb.top_activations`); none where it is off."""
        feature = self._check(feature)
        whole = self if self.k is not None else None
        columns = slice(feature, feature + 1)
        single = dataclasses.replace(
            self,
            w_enc=self.w_enc[:, columns],
            b_enc=self.b_enc[columns],
            threshold=self.threshold[columns],
            gate=None if self.gate is None else self.gate[:, columns],
        )

        def activations(traced: Trace) -> np.ndarray:
            seen = self._seen(traced, None)
            # Which are the k largest, only all of them can tell.
            used, column = (single, 0) if whole is None else (whole, feature)
            return np.asarray(_encode(used, _padded(seen)))[: len(seen), column]

        what = {"feature": feature, **self._attrs()}
        return strongest(
            *(model, tokenizer, texts, k, what, activations),
            include_first=include_first,
            only_on=True,
        )

    @pinned
    def steer(self, feature: int, scale: float, *, positions: Positions = None) -> Steer:
        """Adds `scale` times the feature's decoder row where the autoencoder writes.

        Raises:
          ValueError: no such feature, or an input that nothing can be added to.
        """
        row = self.w_dec[self._check(feature)]
        return Steer(self.layer, row, scale, positions=positions, site=self._written())

    def _written(self) -> str:
        """The site that its output stands for."""
        if self.divided_by:
            raise ValueError(
                f"this autoencoder rebuilds {self.site} divided by {self.divided_by}, which no "
                "vector can be added to"
            )
        return self.site

    def _attrs(self) -> dict[str, Any]:
        return {"layer": -1 if self.layer is None else self.layer, "site": self.site}

    def _check(self, feature: Index) -> int:
        return one(feature, self.num_features, "feature")

    def _seen(self, trace: Trace, positions: tuple[int, ...] | None) -> np.ndarray:
        """(T, D) of the site."""
        values = _at(trace, self.site, self.layer, positions)
        if self.divided_by:
            values = values / _at(trace, self.divided_by, self.layer, positions)
        if values.shape[-1] != self.w_enc.shape[0]:
            raise ValueError(
                f"this autoencoder reads vectors of {self.w_enc.shape[0]} numbers, "
                f"{self.site} has {values.shape[-1]}"
            )
        return values

    def _wanted(self, trace: Trace, positions: tuple[int, ...]) -> np.ndarray:
        """(T, D) that it should rebuild."""
        return self._seen(trace, positions)


@flax.struct.dataclass
class Transcoder(SparseAutoencoder):
    """A sparse replacement of a feed-forward layer: it reads its input and predicts its output.

        f as of `SparseAutoencoder`;  y' = f W_dec + b_dec + x skip

    Source: Dunefsky et al. 2024, arXiv:2406.11944; Paulo et al. 2025, arXiv:2501.18823 (with a skip
    connection, as Gemma Scope 2 calls "affine").

    Attributes:
      skip: (D, D) what of the input is passed on linearly; None for nothing.
      site_out: the site that it predicts, in the same layer.
    """

    skip: Float[Array, "D D"] | None = None
    site_out: str = flax.struct.field(pytree_node=False, default="mlp_out")

    __repr__ = summary

    @classmethod
    @pinned
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        layer: int | None = None,
        site: str | None = None,
        site_out: str | None = None,
    ) -> Transcoder:
        """Reads a folder or file, as `SparseAutoencoder.load` does.

        Args:
          path: a folder or file.
          layer: the layer it was trained on; None takes the configuration's.
          site: what it reads; None takes the configuration's, or else mlp_in.
          site_out: what it predicts; None takes the configuration's, or else mlp_out.
        """
        read = files.read(path)
        read = read.refuse_other_kind(transcoder=True)
        place = hook_points.place(read, layer, site, site_out)
        return cls(**read.arrays(), **read.settings, **place)

    @pinned
    def decode(self, features: Float[Array, "*lead features"]) -> Float[Array, "*lead D"]:
        """The prediction from the features alone.

        Raises:
          ValueError: the input is needed as well, see `reconstruct`.
        """
        if self.skip is not None:
            raise ValueError(
                "this transcoder passes on a part of its input (a skip connection), which its "
                "features do not hold: call reconstruct(x)"
            )
        return features @ self.w_dec + self.b_dec

    @pinned
    def reconstruct(self, x: Float[Array | np.ndarray, "*lead D"]) -> Float[Array, "*lead D"]:
        """Prediction from `x`, the skip connection included."""
        x = _float32(x)
        predicted = self.encode(x) @ self.w_dec + self.b_dec
        return predicted if self.skip is None else predicted + x @ self.skip

    def _written(self) -> str:
        return self.site_out

    def _attrs(self) -> dict[str, Any]:
        return {**super()._attrs(), "site_out": self.site_out}

    def _wanted(self, trace: Trace, positions: tuple[int, ...]) -> np.ndarray:
        return _at(trace, self.site_out, self.layer, positions)


def _at(
    trace: Trace, site: str, layer: int | None, positions: tuple[int, ...] | None
) -> np.ndarray:
    """(T, D) of a site, all of its heads side by side."""
    values = trace.get(site, layer, positions).values
    values = values if layer is None else values[0]
    return values.reshape(len(values), -1)


def _float32(x: Any) -> Any:
    # Not `jnp.asarray` of what is on the host, which is a program for each shape.
    return x.astype(jnp.float32) if isinstance(x, jax.Array) else np.asarray(x, np.float32)


def _padded(seen: np.ndarray) -> np.ndarray:
    """(T, D) float32 with the last row repeated, so that few counts of them are compiled."""
    more = room(len(seen)) - len(seen)
    return np.pad(_float32(seen), ((0, more), (0, 0)), mode="edge")


def _normalised(sae: SparseAutoencoder, x: jax.Array) -> tuple[jax.Array, Any, Any]:
    """x as it is encoded, and what the output is multiplied with and what is added to it."""
    if sae.normalises == "constant_norm_rescale":
        size = jnp.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(x.shape[-1]).astype(np.float32)
        return x / size, size, 0.0
    if sae.normalises == "layer_norm":
        mean = x.mean(axis=-1, keepdims=True)
        spread = x.std(axis=-1, keepdims=True, ddof=1)
        return (x - mean) / (spread + 1e-5), spread, mean
    return x, 1.0, 0.0


@jax.jit
def _encode(sae: SparseAutoencoder, x: jax.Array) -> jax.Array:
    x, _, _ = _normalised(sae, x)
    x = x - sae.b_dec if sae.subtracts_b_dec else x
    if sae.gate is not None:
        r_mag, b_gate = sae.gate
        product = x @ sae.w_enc
        found = jax.nn.relu(product * jnp.exp(r_mag) + sae.b_enc)
        found = jnp.where(product + b_gate > 0, found, 0.0)
    else:
        pre = x @ sae.w_enc + sae.b_enc
        found = jnp.where(pre > sae.threshold, jax.nn.relu(pre), 0.0)
    if sae.k is None:
        return found
    values, which = jax.lax.top_k(found, min(sae.k, found.shape[-1]))
    return jnp.put_along_axis(jnp.zeros_like(found), which, values, axis=-1, inplace=False)


@jax.jit
def _reconstruct(sae: SparseAutoencoder, x: jax.Array) -> jax.Array:
    _, times, plus = _normalised(sae, x)
    return (_encode(sae, x) @ sae.w_dec + sae.b_dec) * times + plus


# Static: how many.
@jax.jit(static_argnums=2)
def _best(sae: SparseAutoencoder, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    values, which = jax.lax.top_k(_encode(sae, x), k)
    return values, which
