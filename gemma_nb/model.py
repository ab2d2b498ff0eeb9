"""A Gemma model as one value: configuration, module and parameters together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb import placement
from gemma_nb.config import TransformerConfig
from gemma_nb.edits import edited, titled
from gemma_nb.executables import pinned
from gemma_nb.expected import elsewhere, token_array
from gemma_nb.inputs import GemmaInputs
from gemma_nb.interventions import Intervention, Interventions
from gemma_nb.interventions.checks import check
from gemma_nb.interventions.numbers import array, known
from gemma_nb.interventions.reach import warn_of_too_late, warn_of_unreached
from gemma_nb.nn import Output, Transformer, Wrapped, adapt
from gemma_nb.presets import ModelInfo
from gemma_nb.structure import ArrayStructure, ParamTree, draw
from gemma_nb.typing import Params

if TYPE_CHECKING:
    import xarray
    from jax.sharding import Mesh
    from treescope import renderers, rendering_parts


@flax.struct.dataclass
class GemmaTransformer:
    """A loaded model.  A pytree, never mutated.

    Attributes:
      params: the official parameter tree.
      config: the model's numbers.
      transformer: what computes with `params`: our linen module, or another one behind its
        interface (see `wrap`).
      info: what is known about the checkpoint; None for a model made by hand.
      storage: what single tokens are decoded from on a CPU: "exact", the layers' weights as they
        are, or "int8", a copy of all but the last with eight bits per weight and a scale per row
        (see `gemma_nb.cpu.storage.pack`: mean KL divergence from float32 2.2e-3, 97 of 100 first
        choices the same over 1,040 tokens of English with Gemma 3 270M).  Scoring and tracing use
        `params`' own precision either way, and so do prompts where there is memory for another copy
        of the layers; but with "int8", on processors that are faster with bfloat16, activations are
        rounded to it where they meet weights (mean KL 1.9e-4, of which the vocabulary head alone
        makes 1.4e-4; 996 of 1,000 first choices the same).
      interventions: what is changed in every computation, see `intervene`; None changes nothing.
      edits: what of the parameters is no longer what `info` names, in order: the globs given to
        `edit`, and "other parameters" where they were replaced.
    """

    params: Params
    config: TransformerConfig = flax.struct.field(pytree_node=False)
    transformer: Transformer | Wrapped = flax.struct.field(pytree_node=False)
    info: ModelInfo | None = flax.struct.field(pytree_node=False, default=None)
    storage: Literal["exact", "int8"] = flax.struct.field(pytree_node=False, default="exact")
    interventions: Interventions | None = None
    edits: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    @classmethod
    @pinned
    def from_config(cls, config: TransformerConfig, *, key: Any = None) -> GemmaTransformer:
        """A model with random float32 weights, or without a key with shapes in their place.

        Args:
          config: the model's numbers.
          key: a `jax.random.key`; None leaves `jax.ShapeDtypeStruct`s as parameters.
        """
        transformer = Transformer(config)

        def init(key: Any) -> Params:
            return transformer.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

        params = jax.eval_shape(init, jax.random.key(0)) if key is None else jax.jit(init)(key)
        return cls(params=params, config=config, transformer=transformer)

    @classmethod
    @pinned
    def from_pretrained(
        cls,
        ckpt_params: Mapping[str, Any],
        upcast_activations_to_float32: bool = False,
        *,
        config: TransformerConfig | None = None,
    ) -> GemmaTransformer:
        """A model of official parameters that are in memory already; they are not copied.

        Args:
          ckpt_params: as Orbax restores them: nested, or flat
            (`{"transformer/layer_0/attn/q_einsum": {"w": ...}}`), with old or new names, below
            "transformer", "params" or neither; the text part of a multimodal checkpoint is taken.
          upcast_activations_to_float32: compute activations in float32 whatever the parameters'
            dtype; otherwise in the embedding's own dtype.
          config: the model's numbers; None reads them from the names and shapes.

        Raises:
          CheckpointError: a parameter is missing, unknown, of another shape, or holds NaN or
            other things than floating-point numbers; or the names and shapes leave the
            configuration open, and the message names the choices.
        """
        from gemma_nb.checkpoints import arrays, infer, layout

        params = layout.nest(layout.official(ckpt_params))
        if config is None:
            config = infer.config_of(params)
        else:
            infer.check(infer.shapes_of(params), config)
        for path, leaf in layout.flatten(params).items():
            arrays.check_numbers(leaf, path, "the parameters")
        params = jax.tree.map(_as_jax, params)
        own = params["embedder"]["input_embedding"].dtype
        dtype = jnp.float32 if upcast_activations_to_float32 else own
        return cls(params=params, config=config, transformer=Transformer(config, dtype=dtype))

    @classmethod
    def wrap(
        cls,
        transformer_like: Any,
        params: Mapping[str, Any],
        *,
        config: TransformerConfig | None = None,
    ) -> GemmaTransformer:
        """A model that computes with another implementation of Gemma.

        Args:
          transformer_like: a `gm.nn.TransformerLike` (google-deepmind/gemma), such as
            `gm.nn.Gemma3_1B()`, or our own `gnb.nn.Transformer`.
          params: what it takes: its variables, or their "params".
          config: its numbers; None reads them from its own `config`.

        Raises:
          ValueError: its configuration is not one of Gemma 1, 2 or 3.
        """
        transformer = adapt(transformer_like, config)
        params = params["params"] if set(params) == {"params"} else params
        return cls(params=params, config=transformer.config, transformer=transformer)

    @property
    def mesh(self) -> Mesh | None:
        """The devices that the parameters are spread over; None for a single one."""
        return placement.mesh_of(self.params)

    @pinned
    def place(self, mesh: placement.MeshLike) -> GemmaTransformer:
        """A copy whose parameters are split over `mesh`, see `gemma_nb.placement`."""
        placed = placement.place(self.params, self.config, mesh)
        return self.replace(params=placed, edits=self.edits)

    def edit(self, path_glob: str, fn: Callable[[Any], Any]) -> GemmaTransformer:
        """A copy with `fn` applied to some parameters; all others are shared with this model.

        The copy's `title` says what was edited, in its repr and in all that is computed with it.

            model.edit("layer_*/attn/q_einsum/w", lambda w: 0.5 * w)

        Args:
          path_glob: path from the root, names joined by "/"; "*" stands for any part of one name,
            "**" for any number of names, "?" and "[0-3]" as in a shell.
          fn: takes an array and returns one of the same shape.

        Raises:
          ValueError: no parameter matches, or `fn` changed a shape.
        """
        params, told = edited(self.params, path_glob, fn)
        return self.replace(params=params, edits=(*self.edits, told))

    def intervene(self, *interventions: Intervention, start: int = 0) -> GemmaTransformer:
        """A copy that computes differently; the weights are shared, this model is untouched.

            model.intervene(gnb.AblateHeads({5: [2]}), gnb.Steer(9, vector, scale=4.0))

        An intervention at positions that all come before `start` is an InterventionWarning.

        The copy's interventions follow this model's own, in order, in every pass: scoring, traces,
        prefill and cached decoding.

        Args:
          *interventions: see `gemma_nb.interventions`; none gives a copy without any.
          start: the first absolute position at which they act.

        Raises:
          ValueError: a layer, head or neuron that the model does not have, a value of another
            shape, another start than that of interventions there are, or a transformer of another
            library.
        """
        if not interventions:
            return self.replace(interventions=None)
        if isinstance(self.transformer, Wrapped):
            raise ValueError(
                "a wrapped transformer takes no interventions: they happen inside our modules.  "
                "Compute with gnb.nn.Transformer on the same parameters"
            )
        for each in interventions:
            check(each, self.config)
        if known("start", start) < 0:
            raise ValueError(f"start must be a position from 0 on, got {start}")
        before = self.interventions
        if before is not None and known("start", before.start) != start:
            raise ValueError(
                f"the interventions of this model start at position {int(before.start)}: pass "
                f"start={int(before.start)}, or call intervene() first, which takes them away"
            )
        items = (*(before.items if before is not None else ()), *interventions)
        under = Interventions(items, array(start, np.int32))
        warn_of_too_late(under)
        return self.replace(interventions=under)

    @pinned
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes an Orbax checkpoint in the official layout, which `gnb.load(path)` reads back.

        Returns:
          The folder written.

        Raises:
          CheckpointError: the folder exists already or cannot be written, or the model has no
            weights.
        """
        from gemma_nb.checkpoints import orbax

        return orbax.save_params(self.params, self.config, path)

    def input_structure(self) -> dict[str, ArrayStructure]:
        """Fields of `GemmaInputs`: their axes, sizes and types.  "batch" may be left out."""
        sizes = {"batch": None, "seq": None}
        last = self.config.num_embed - 1
        return {
            "tokens": ArrayStructure(sizes, "int32", f"token ids from 0 to {last}"),
            "positions": ArrayStructure(sizes, "int32", "from 0 on; -1 is padding", True),
            "attention_mask": ArrayStructure(
                {**sizes, "key": None}, "bool", "True where a token may see a key", True
            ),
        }

    def output_structure(self) -> ArrayStructure:
        """Axes, sizes and type of the scores.  There is a "batch" where the tokens have one."""
        sizes = {"batch": None, "seq": None, "vocabulary": self.config.num_embed}
        return ArrayStructure(sizes, "float32", "logits of the next token")

    def __getattr__(self, name: str) -> NoReturn:
        instead = elsewhere(name)
        raise AttributeError(
            f"GemmaTransformer has no attribute {name!r}{f': {instead}' if instead else ''}"
        )

    def __call__(self, inputs: GemmaInputs) -> xarray.DataArray:
        """float32 logits ("seq", "vocabulary"), led by "batch" where the tokens are.

        The logits at position t are for the token at position t + 1.  An intervention that names
        positions which the tokens do not reach is an InterventionWarning.  Token ids alone, (T,) or
        (B, T), are as good as `GemmaInputs` of them.

        Raises:
          TypeError: a text, or something else that is no token ids.
          ValueError: tokens outside the vocabulary, or not of one or two axes; positions or a mask
            of another shape; a model without weights.
        """
        if not isinstance(inputs, GemmaInputs):
            inputs = GemmaInputs(inputs)
        found = token_array(
            inputs.tokens,
            "tokens",
            "model([tokenizer.encode(text, bos=True)]) scores a text, and "
            "gnb.trace(model, text, tokenizer=tokenizer) shows it from the inside",
        )
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self.params)):
            raise ValueError(
                "this model has shapes in place of weights and cannot compute: give from_config a "
                "key=jax.random.key(0), or load a checkpoint"
            )
        inputs.check(found, self.config.num_embed)
        at = None if inputs.positions is None else np.asarray(inputs.positions)
        length = found.shape[-1] if at is None else int(at.max()) + 1
        warn_of_unreached(self.interventions, length)
        return self._logits(found.astype(np.int32), inputs)

    @pinned
    def _logits(self, tokens: np.ndarray, inputs: GemmaInputs) -> xarray.DataArray:
        import xarray

        def batched(x: Any) -> jax.Array | None:
            x = x if x is None or tokens.ndim == 2 else np.asarray(x)[None]
            return placement.place_batch(x, self.mesh)

        logits = _score(
            self.transformer,
            self.params,
            batched(tokens),
            batched(inputs.positions),
            batched(inputs.attention_mask),
            self.interventions,
        )
        dims = ("batch", "seq", "vocabulary")
        array = xarray.DataArray(placement.fetch(logits), dims=dims, name="logits")
        return array if tokens.ndim == 2 else array[0]

    def __repr__(self) -> str:
        c = self.config
        dtypes = {str(x.dtype) for x in jax.tree.leaves(self.params)}
        kv_heads = dict.fromkeys(str(c.axis_sizes(spec)["K"]) for spec in c.layers)
        return (
            f"<GemmaTransformer {self.title}: {c.num_params():,} parameters, {c.num_layers} "
            f"layers, {c.num_heads} heads on {'/'.join(kv_heads)} key-value heads, "
            f"{'/'.join(sorted(dtypes))}{self._under}>"
        )

    @property
    def _under(self) -> str:
        return f", under {self.interventions}" if self.interventions is not None else ""

    @property
    def title(self) -> str:
        """Name of the model: its released one, or "Gemma", and its edits."""
        return titled(self.info.title if self.info else "Gemma", self.edits)

    def __treescope_repr__(
        self, path: str | None, subtree_renderer: renderers.TreescopeSubtreeRenderer
    ) -> rendering_parts.Rendering:
        shown: dict[str, Any] = {"params": ParamTree(self.params, self.config)}
        if self.interventions is not None:
            shown["interventions"] = self.interventions
        shown |= {"config": self.config, "info": self.info}
        return draw(shown, repr(self), path, subtree_renderer)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        # Not `_repr_html_`: treescope would put that into the tree that it draws.
        import treescope

        return {"text/plain": repr(self), "text/html": treescope.render_to_html(self)}

    def __deepcopy__(self, _: dict[int, Any]) -> GemmaTransformer:
        # Arrays never change, and are shared.
        return self.replace(params=jax.tree.map(lambda leaf: leaf, self.params))

    def replace(self, **changes: Any) -> GemmaTransformer:
        """A copy with some fields changed; everything else is shared.

        Other parameters in the place of a checkpoint's show in the copy's `title`.
        """
        return _replaced(self, **changes)


def _replaced(model: GemmaTransformer, **changes: Any) -> GemmaTransformer:
    """`GemmaTransformer.replace`."""
    named = model.info is not None and "info" not in changes and "edits" not in changes
    if named and changes.get("params", model.params) is not model.params:
        changes["edits"] = (*model.edits, "other parameters")
    return dataclasses.replace(model, **changes)


# flax's decorator has put a `replace` of its own over the class's.
setattr(GemmaTransformer, "replace", _replaced)  # noqa: B010


def _as_jax(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else jnp.asarray(leaf)


# Static: the module (a frozen dataclass of numbers).  A new text length recompiles.
@jax.jit(static_argnums=0)
def _score(
    transformer: Transformer | Wrapped,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None,
    attention_mask: jax.Array | None,
    interventions: Interventions | None,
) -> jax.Array:
    output = transformer.apply(
        {"params": params},
        tokens,
        positions=positions,
        attention_mask=attention_mask,
        interventions=interventions,
    )
    return cast(Output, output).logits.astype(jnp.float32)
