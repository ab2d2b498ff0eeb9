"""Interventions on vectors: feed-forward outputs, patches, steering, neurons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.interventions.base import (
    Intervention,
    Positions,
    Where,
    check_patchable,
    check_places,
    check_width,
    fill,
    ints,
    last_of,
    listed,
    node,
    place,
    plain,
    replaced,
    replacements,
    shape_of,
    short,
    static,
    wide,
)
from gemma_nb.interventions.numbers import array, is_traced, known, padded
from gemma_nb.sites import EVERYWHERE, SITES

if TYPE_CHECKING:
    from gemma_nb.config import TransformerConfig


@node
class AblateMLP(Intervention):
    """Replaces what feed-forward layers add to the residual stream: `AblateMLP([5, 6])`.

    Attributes:
      layers: (M,) int32, padded.
      values: (M, P, D), what it is replaced with; P is 1 but for "resample", see `replacements`.
      where: at which positions.
      method: "zero", "mean" or "resample", as of `AblateHeads`.
    """

    layers: jax.Array
    values: jax.Array
    where: Where
    method: str = static()

    def __init__(
        self,
        layers: Iterable[int] | int,
        method: Literal["zero", "mean", "resample"] = "zero",
        *,
        reference: Any = None,
        positions: Positions = None,
    ) -> None:
        known("layers", layers)
        chosen = [layers] if isinstance(layers, int) else list(layers)
        fill(self, layers=ints(chosen), method=method, where=Where.of(positions))

        def out(part: int) -> Any:
            return reference.get("mlp_out", layers=chosen[part]).values[0]

        given = None if reference is None else out
        fill(self, values=replacements(method, given, len(chosen)))

    @property
    def sites(self) -> tuple[str, ...]:
        """mlp_out."""
        return ("mlp_out",)

    def apply(self, value: jax.Array, layer: Any, positions: jax.Array, keys: Any) -> jax.Array:
        """mlp_out, replaced."""
        del keys
        found, which = last_of((self.layers == layer)[:, None])
        new, inside = replaced(self.values, which, positions, self.method)
        acts = wide(self.where(positions), 4) & found[:, None] & inside
        return jnp.where(acts, new.astype(value.dtype), value[:, :, None])[:, :, 0]

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError for an unknown layer, or a reference of another width."""
        check_places(config, self.layers)
        if self.method != "zero":
            check_width(self.values.shape[-1], config.embed_dim, "the reference's mlp_out")

    def __str__(self) -> str:
        return f"ablate MLPs {short(plain(self.layers))} ({self.method}) at {self.where}"


@node
class Patch(Intervention):
    """Puts given numbers in a site's place: `Patch("residual", 5, [3, 4], value)`.

    Activation patching (Meng et al. 2022, arXiv:2202.05262, "causal tracing") puts what another run
    computed; `Patch.from_trace` takes it from there.

    Attributes:
      layer: () int32.
      positions: (P,) int32 absolute positions, padded.
      value: (P, ...) of the site, or of its `heads` only: (P, heads, H).
      heads: (n,) int32, padded, or None for all of the site.
      site: any sown site but the maps and norms' scales.
    """

    layer: jax.Array
    positions: jax.Array
    value: jax.Array
    heads: jax.Array | None
    site: str = static()

    def __init__(
        self,
        site: str,
        layer: int | None,
        positions: Sequence[int] | int,
        value: Any,
        *,
        heads: Sequence[int] | None = None,
    ) -> None:
        check_patchable(site, layer)
        at, new = listed(positions), array(value)
        if len(set(plain(at))) < len(at):
            raise ValueError(f"a position can be patched once, got {short(plain(at))}")
        if heads is not None and len(SITES[site].dims) < 4:
            raise ValueError(f"{site} has no heads: leave out heads={list(heads)}")
        if new.ndim == len(SITES[site].dims) - 2:
            new = jnp.broadcast_to(new, (len(at), *new.shape))
        if heads is not None and new.shape[1:2] != (len(heads),):
            raise ValueError(
                f"value must hold one vector for each of {len(heads)} heads, got {new.shape}"
            )
        if new.shape[:1] != at.shape:
            raise ValueError(
                f"value must hold one {site} for each of {len(at)} positions, got {new.shape}"
            )
        fill(self, site=site, layer=place("layer", layer))
        fill(self, positions=ints(at), value=padded(new, new.dtype, 0, 1 if heads is None else 2))
        fill(self, heads=None if heads is None else ints(known("heads", heads)))

    @classmethod
    def from_trace(
        cls,
        trace: Any,
        site: str,
        layer: int | None = None,
        positions: Sequence[int] | int | None = None,
        *,
        heads: Sequence[int] | None = None,
    ) -> Patch:
        """What a `Trace` saw there; positions None takes all of its."""
        if positions is None:
            positions = range(len(trace.tokens))
        at = [positions] if isinstance(positions, int) else list(positions)
        value = trace.get(site, layers=layer, positions=at).values
        value = value if layer is None else value[0]
        return cls(site, layer, at, value if heads is None else value[:, list(heads)], heads=heads)

    @property
    def sites(self) -> tuple[str, ...]:
        """The one that was given."""
        return (self.site,)

    def apply(self, value: jax.Array, layer: Any, positions: jax.Array, keys: Any) -> jax.Array:
        """The site with the given numbers at the given positions."""
        del keys
        match = positions[..., None] == self.positions  # (B, T, P)
        new = self.value[match.argmax(axis=-1)].astype(value.dtype)
        acts = wide(match.any(axis=-1) & (self.layer == layer), value.ndim)
        if self.heads is not None:
            new = jnp.broadcast_to(new, (*value.shape[:2], *new.shape[2:]))
            # Padding, which is negative, would be counted from the end.
            heads = jnp.where(self.heads < 0, value.shape[2], self.heads)
            new = value.at[:, :, heads].set(new, mode="drop")
        return jnp.where(acts, new, value)

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError for an unknown layer or head, or a value of another shape."""
        expected = shape_of(self.site, config)
        if SITES[self.site].per_layer:
            check_places(config, self.layer, self.heads, expected[0])
        if self.heads is not None:
            expected = (len(self.heads), *expected[1:])
        if self.value.shape[1:] != expected:
            raise ValueError(
                f"{self.site} of one position is {expected}, got a value of {self.value.shape[1:]}"
            )

    def __str__(self) -> str:
        heads = "" if self.heads is None else f", heads {short(plain(self.heads))}"
        where = "" if int(self.layer) == EVERYWHERE else f" of layer {int(self.layer)}"
        return f"patch {self.site}{where}{heads} at positions {short(plain(self.positions))}"


@node
class Steer(Intervention):
    """Adds `scale * vector` to a site: `Steer(9, vector, scale=4.0)`.

    Activation addition (Turner et al. 2023, arXiv:2308.10248); see `steering_vector` for one from
    contrasting prompts.  The vector is added as it is: compare its norm with the residual stream's
    (`gnb.residual_norms`).

    Attributes:
      layer: () int32; `EVERYWHERE` at a site that the model has once.
      vector: (D,).
      scale: () float32.
      where: at which positions.
      site: by default the residual stream after the layer.
    """

    layer: jax.Array
    vector: jax.Array
    scale: jax.Array
    where: Where
    site: str = static()

    def __init__(
        self,
        layer: int | None,
        vector: Any,
        scale: float = 1.0,
        *,
        positions: Positions = None,
        site: str = "residual",
    ) -> None:
        check_patchable(site, layer)
        fill(self, layer=place("layer", layer), vector=array(vector, np.float32))
        fill(self, scale=array(scale, np.float32), where=Where.of(positions), site=site)

    @property
    def sites(self) -> tuple[str, ...]:
        """The residual stream, or the site that was given."""
        return (self.site,)

    def apply(self, value: jax.Array, layer: Any, positions: jax.Array, keys: Any) -> jax.Array:
        """The site with the vector added."""
        del keys
        acts = wide(self.where(positions) & (self.layer == layer), value.ndim)
        return jnp.where(acts, value + (self.scale * self.vector).astype(value.dtype), value)

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError for an unknown layer or a vector of another length."""
        if SITES[self.site].per_layer:
            check_places(config, self.layer)
        expected = shape_of(self.site, config)
        if self.vector.shape != expected:
            raise ValueError(f"a vector for {self.site} is {expected}, got {self.vector.shape}")

    def __str__(self) -> str:
        norm = float(np.linalg.norm(np.asarray(self.vector)))
        where = "" if int(self.layer) == EVERYWHERE else f" of layer {int(self.layer)}"
        return (
            f"steer {self.site}{where} by {float(self.scale):g} times a vector of norm {norm:.3g} "
            f"at {self.where}"
        )


@node
class EditNeuron(Intervention):
    """Sets a hidden unit of a feed-forward layer: `EditNeuron(5, 1234, 3.0)`.

    Attributes:
      layer: () int32.
      neuron: () int32, index into `mlp_hidden`.
      value: () float32.
      where: at which positions.
      method: "set", "add" or "multiply".
    """

    layer: jax.Array
    neuron: jax.Array
    value: jax.Array
    where: Where
    method: str = static()

    def __init__(
        self,
        layer: int,
        neuron: int,
        value: float,
        *,
        method: Literal["set", "add", "multiply"] = "set",
        positions: Positions = None,
    ) -> None:
        if method not in ("set", "add", "multiply"):
            raise ValueError(f'method must be "set", "add" or "multiply", got {method!r}')
        fill(self, layer=place("layer", layer), neuron=place("neuron", neuron), method=method)
        fill(self, value=array(value, np.float32), where=Where.of(positions))

    @property
    def sites(self) -> tuple[str, ...]:
        """mlp_hidden."""
        return ("mlp_hidden",)

    def apply(self, value: jax.Array, layer: Any, positions: jax.Array, keys: Any) -> jax.Array:
        """mlp_hidden with the unit edited."""
        del keys
        given = self.value.astype(value.dtype)
        new = {"set": given, "add": value + given, "multiply": value * given}[self.method]
        acts = self.where(positions) & (self.layer == layer)
        mine = jnp.arange(value.shape[-1]) == self.neuron
        return jnp.where(acts[..., None] & mine, new, value)

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError for an unknown layer or neuron."""
        check_places(config, self.layer)
        if not is_traced(self.neuron) and not 0 <= int(self.neuron) < config.hidden_dim:
            raise ValueError(
                f"neuron {int(self.neuron)} does not exist: "
                f"a layer has neurons 0 to {config.hidden_dim - 1}"
            )

    def __str__(self) -> str:
        value = f"{float(self.value):g}"
        done = {"set": f"to {value}", "add": f"plus {value}", "multiply": f"times {value}"}
        neuron = f"neuron {int(self.neuron)} of layer {int(self.layer)}"
        return f"{neuron} {done[self.method]} at {self.where}"
