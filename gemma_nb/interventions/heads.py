"""Interventions on the outputs of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.indices import Indices, number
from gemma_nb.interventions.base import Intervention, wide
from gemma_nb.interventions.checks import check_places, check_width
from gemma_nb.interventions.numbers import is_traced, known, padded, plain, real, short
from gemma_nb.interventions.positions import Positions, Where, ints, taken
from gemma_nb.interventions.pytrees import fill, node, static
from gemma_nb.interventions.reach import unsampled
from gemma_nb.interventions.replacements import last_of, replaced, replacements

if TYPE_CHECKING:
    from gemma_nb.config import TransformerConfig


@node
class ScaleHeads(Intervention):
    """Multiplies the outputs z of heads, before they are projected: `ScaleHeads({5: {2: 0.5}})`.

    Attributes:
      layers: (M,) int32, one for each head, padded.
      heads: (M,) int32.
      factors: (M,) float32.
      where: at which positions.
    """

    layers: jax.Array
    heads: jax.Array
    factors: jax.Array
    where: Where

    def __init__(
        self, factors: Mapping[int, Mapping[int, float]], *, positions: Positions = None
    ) -> None:
        try:
            flat = [(i, head, f) for i, of in factors.items() for head, f in of.items()]
        except (AttributeError, TypeError):
            raise ValueError(
                "name each head's factor by its layer, such as {5: {2: 0.5}}, got "
                f"{factors!r:.60}"
            ) from None
        known("layers and heads", [x[:2] for x in flat])
        layers = ints(number(x[0], "a layer in factors") for x in flat)
        heads = ints(number(x[1], "a head in factors") for x in flat)
        fill(self, layers=layers, heads=heads)
        fill(self, factors=padded([x[2] for x in flat], np.float32, 1.0, name="factors"))
        fill(self, where=Where.of(positions))

    @property
    def sites(self) -> tuple[str, ...]:
        """z."""
        return ("z",)

    def apply(self, value: jax.Array, layer: Any, positions: jax.Array, keys: Any) -> jax.Array:
        """z of the heads, multiplied."""
        del keys
        mine = (self.layers == layer)[:, None] & (self.heads[:, None] == jnp.arange(value.shape[2]))
        # Not a scatter, which has no gradient.
        by_head = jnp.where(mine, self.factors[:, None], 1.0).prod(axis=0)
        scaled = value * by_head[:, None].astype(value.dtype)
        return jnp.where(wide(self.where(positions), value.ndim), scaled, value)

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError for an unknown layer or head."""
        check_places(config, self.layers, self.heads)

    def __str__(self) -> str:
        factors = np.asarray(self.factors)[real(self.layers)].tolist()
        parts = zip(plain(self.layers), plain(self.heads), factors, strict=True)
        heads = short([f"{i}.{h} by {f:g}" for i, h, f in parts], 24)
        return f"scale heads {heads} at {self.where}"


@node
class AblateHeads(Intervention):
    """Replaces the outputs z of heads: `AblateHeads({5: [2, 3]})`.

    With zeros, which is the same as zeroing the heads' rows of `attn_vec_einsum`; with their mean
    over the positions of a reference trace ("mean"); or with what they were in another trace at the
    same positions ("resample", Chan et al. 2022, "Causal scrubbing").  Zero is not what a head says
    when it has nothing to say: where that matters, ablate with a mean.

    Attributes:
      layers: (M,) int32, one for each head, padded.
      heads: (M,) int32.
      values: (M, P, H), what they are replaced with; P is 1 but for "resample", see
        `replacements`.
      where: at which positions.
      method: "zero", "mean" or "resample".
    """

    layers: jax.Array
    heads: jax.Array
    values: jax.Array
    where: Where
    method: str = static()

    def __init__(
        self,
        heads: Mapping[int, Indices],
        method: Literal["zero", "mean", "resample"] = "zero",
        *,
        reference: Any = None,
        positions: Positions = None,
    ) -> None:
        known("heads", heads)
        try:
            given: list[tuple[int, Any]] = [
                (number(i, "a layer in heads"), of if isinstance(of, slice) else list(of))  # type: ignore[arg-type]
                for i, of in heads.items()
            ]
        except (AttributeError, TypeError):
            raise ValueError(
                f"name heads by their layer, such as {{5: [2, 3]}}, got {heads!r:.60}"
            ) from None
        some = [(i, *taken(of, f"heads of layer {i}")) for i, of in given]
        flat = [(i, head) for i, chosen, _ in some for head in chosen]
        fill(self, masks=tuple((f"heads of layer {i}", n) for i, _, n in some if n is not None))
        fill(self, layers=ints(x[0] for x in flat), heads=ints(x[1] for x in flat))
        fill(self, method=method, where=Where.of(positions))

        def z(part: int) -> Any:
            layer, head = flat[part]
            return reference.get("z", layer, heads=head).values[0, :, 0]

        fill(self, values=replacements(method, None if reference is None else z, len(flat)))

    def unreached(self, length: int) -> str:
        """Positions that are not reached, in words, or a reference shorter than the text."""
        return super().unreached(length) or unsampled(self, length)

    @property
    def sites(self) -> tuple[str, ...]:
        """z."""
        return ("z",)

    def apply(self, value: jax.Array, layer: Any, positions: jax.Array, keys: Any) -> jax.Array:
        """z, replaced."""
        del keys
        mine = (self.layers == layer)[:, None] & (self.heads[:, None] == jnp.arange(value.shape[2]))
        found, which = last_of(mine)
        new, inside = replaced(self.values, which, positions, self.method)
        acts = wide(self.where(positions), value.ndim) & found[:, None] & inside
        return jnp.where(acts, new.astype(value.dtype), value)

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError for an unknown layer or head, or a reference of another width."""
        check_places(config, self.layers, self.heads)
        if self.method != "zero":
            layers = None if is_traced(self.layers) else plain(self.layers)
            width = config.shared_size("H", layers)
            check_width(self.values.shape[-1], width, "the reference's z")

    def __str__(self) -> str:
        parts = zip(*map(plain, (self.layers, self.heads)), strict=True)
        heads = short([f"{i}.{h}" for i, h in parts], 24)
        return f"ablate heads {heads} ({self.method}) at {self.where}"
