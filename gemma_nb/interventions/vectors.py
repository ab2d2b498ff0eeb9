"""Interventions on vectors: feed-forward outputs, patches, steering, neurons."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.indices import Indices
from gemma_nb.interventions.base import Intervention, wide
from gemma_nb.interventions.checks import check_places, check_width, patchable_site, shape_of
from gemma_nb.interventions.numbers import array, is_traced, padded, plain, short
from gemma_nb.interventions.positions import Positions, Where, from_zero, ints, single, taken
from gemma_nb.interventions.pytrees import fill, node, static
from gemma_nb.interventions.reach import unsampled
from gemma_nb.interventions.replacements import last_of, replaced, replacements
from gemma_nb.sites import EVERYWHERE, SITES

if TYPE_CHECKING:
    from gemma_nb.config import TransformerConfig


def _layer(layer: int | None) -> jax.Array:
    return array(EVERYWHERE, np.int32) if layer is None else single(layer, "layer")


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
        layers: Indices,
        method: Literal["zero", "mean", "resample"] = "zero",
        *,
        reference: Any = None,
        positions: Positions = None,
    ) -> None:
        chosen, mask = taken(layers, "layers")
        fill(self, masks=() if mask is None else (("layers", mask),))
        fill(self, layers=ints(chosen), method=method, where=Where.of(positions))

        def out(part: int) -> Any:
            return reference.get("mlp_out", layers=chosen[part]).values[0]

        given = None if reference is None else out
        fill(self, values=replacements(method, given, len(chosen)))

    def unreached(self, length: int) -> str:
        """Positions that are not reached, in words, or a reference shorter than the text."""
        return super().unreached(length) or unsampled(self, length)

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
      site: any sown site but the maps and norms' scales; an alias ("resid_post") is as good.
    """

    layer: jax.Array
    positions: jax.Array
    value: jax.Array
    heads: jax.Array | None
    site: str = static()
    mask: ClassVar[int | None] = None  # length of the mask that the positions were

    def __init__(
        self,
        site: str,
        layer: int | None,
        positions: Indices,
        value: Any,
        *,
        heads: Indices = None,
    ) -> None:
        site = patchable_site(site, layer)
        named, mask = taken(positions, "positions")
        at, new = from_zero(named, positions), array(value)
        if len(set(named)) < len(named):
            raise ValueError(f"a position can be patched once, got {short(named)}")
        if heads is not None and len(SITES[site].dims) < 4:
            raise ValueError(f"{site} has no heads: leave out heads={heads!r:.60}")
        some, of_heads = (None, None) if heads is None else taken(heads, "heads")
        if some is not None and len(set(some)) < len(some):
            raise ValueError(f"a head can be patched once, got {short(some)}")
        if new.ndim == len(SITES[site].dims) - 2:
            new = jnp.broadcast_to(new, (len(named), *new.shape))
        if new.shape[:1] != (len(named),):
            raise ValueError(
                f"value must hold one {site} for each of {len(named)} positions, got {new.shape}"
            )
        if some is not None and new.shape[1:2] != (len(some),):
            raise ValueError(
                f"value must hold one vector for each of {len(some)} heads, got {new.shape}"
            )
        axes = 1 if some is None else 2
        fill(self, site=site, layer=_layer(layer), positions=at)
        fill(self, value=padded(new, new.dtype, 0, axes))
        fill(self, heads=None if some is None else ints(some), mask=mask)
        fill(self, masks=() if of_heads is None else (("heads", of_heads),))

    @classmethod
    def from_trace(
        cls,
        trace: Any,
        site: str,
        layer: int | None = None,
        positions: Indices = None,
        *,
        heads: Indices = None,
    ) -> Patch:
        """A patch of what a `Trace` saw, each value at its own position and in its own head.

        Args:
          trace: where values come from.
          site: as of a patch.
          layer: as of a patch; negative numbers count from the last.
          positions: as of `trace.get`, in any order; None for all.
          heads: as of `trace.get`, in any order; None for all.

        Raises:
          ValueError: something that the trace does not have.
        """
        site = patchable_site(site, layer)
        found = trace.get(site, None if layer is None else single(layer, "layer"), positions, heads)
        at, value = found["position"].values, found.values
        if layer is not None:
            layer, value = int(found["layer"].values[0]), value[0]
        dim = next((d for d in ("head", "kv_head") if d in found.dims), None)
        some = None if heads is None or dim is None else found[dim].values
        return cls(site, layer, at, value, heads=some)

    @property
    def last(self) -> int:
        """The last position patched, -1 for none."""
        return max(plain(self.positions), default=-1)

    def beyond(self, length: int) -> list[int]:
        """The positions that a text of `length` tokens does not have."""
        return [p for p in plain(self.positions) if p >= length]

    def unreached(self, length: int) -> str:
        """Positions that are not reached, in words; "" for none."""
        if self.mask is not None and self.mask != length:
            return f"its mask of positions is {self.mask} long"
        return super().unreached(length)

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
        if SITES[self.site].per_layer:
            check_places(config, self.layer)
        expected = shape_of(self.site, config, self.layer)
        if self.heads is not None:
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
      vector: (D,), or as the site's value of one position is; of z and others with heads, all
        heads side by side are as good.
      scale: () float32.
      where: at which positions.
      site: by default the residual stream after the layer; an alias is as good.
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
        site = patchable_site(site, layer)
        fill(self, layer=_layer(layer), vector=array(vector, np.float32, "vector"))
        fill(self, scale=array(scale, np.float32, "scale"), where=Where.of(positions), site=site)

    @property
    def sites(self) -> tuple[str, ...]:
        """The residual stream, or the site that was given."""
        return (self.site,)

    def apply(self, value: jax.Array, layer: Any, positions: jax.Array, keys: Any) -> jax.Array:
        """The site with the vector added."""
        del keys
        acts = wide(self.where(positions) & (self.layer == layer), value.ndim)
        added = (self.scale * self.vector).reshape(value.shape[2:])
        return jnp.where(acts, value + added.astype(value.dtype), value)

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError for an unknown layer or a vector of another length."""
        if SITES[self.site].per_layer:
            check_places(config, self.layer)
        expected = shape_of(self.site, config, self.layer)
        if self.vector.shape not in (expected, (math.prod(expected),)):
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
        fill(self, layer=single(layer, "layer"), neuron=single(neuron, "neuron"), method=method)
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
        (count,) = shape_of("mlp_hidden", config, self.layer)
        if not is_traced(self.neuron) and not 0 <= int(self.neuron) < count:
            raise ValueError(
                f"neuron {int(self.neuron)} does not exist: a layer has neurons 0 to {count - 1}"
            )

    def __str__(self) -> str:
        value = f"{float(self.value):g}"
        done = {"set": f"to {value}", "add": f"plus {value}", "multiply": f"times {value}"}
        neuron = f"neuron {int(self.neuron)} of layer {int(self.layer)}"
        return f"{neuron} {done[self.method]} at {self.where}"
