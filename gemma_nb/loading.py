"""`gnb.load`: from a name or a path to a model and its tokenizer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from gemma_nb import settings
from gemma_nb.checkpoints import load as checkpoint
from gemma_nb.lazy import uncollected

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gemma_nb.checkpoints.load import Progress
    from gemma_nb.model import GemmaTransformer
    from gemma_nb.text.tokenizer import Tokenizer


def load(
    source: str | os.PathLike[str] = "gemma3-270m",
    *,
    dtype: str | None = None,
    mesh: Mesh | Literal["auto"] | None = None,
    revision: str | None = None,
    step: int | None = None,
    upcast_activations_to_float32: bool = True,
    force: bool = False,
    progress: Progress = None,
) -> tuple[GemmaTransformer, Tokenizer]:
    """A model and its tokenizer.

    The first load of a GGUF file converts it, which takes some seconds, and keeps the result
    below `gemma_nb.cache.cache_dir()`; later loads map that file into memory.
    Folders are read anew each time.

    Args:
      source: a released name (see `gnb.list_models()`) or a path: a GGUF file (any of its files
        where it is split), an official Orbax checkpoint folder, what a `CheckpointManager` of
        Orbax saves to, or a Hugging Face folder.
      dtype: of the parameters: "bfloat16" (the default) or "float32", in which logits of whole
        passes of Gemma 3 270M are 1e-6 to 3e-6 (relative) off float64's on a CPU, from 512 tokens
        on 1e-6 to 2e-6 (torch's are 1e-6); "int8" keeps them in bfloat16 and decodes from an int8
        copy of the layers, which is faster and less exact (see `gemma_nb.sampling.weights`).
      mesh: devices to spread the parameters over, see `gemma_nb.placement`; "auto" takes all.
      revision: of a released model at its hub.
      step: of a `CheckpointManager`'s folder; None takes the last one that was finished.
      upcast_activations_to_float32: compute activations in float32 whatever the parameters' dtype,
        which is the default here: it costs little where memory is what takes the time, and is what
        the references are met with.  False computes in the parameters' own dtype, as
        `GemmaTransformer.from_pretrained` does unless it is told otherwise.
      force: load also what does not seem to fit into memory.
      progress: None shows a progress bar while converting or reading, False shows nothing, a
        function is called with the fraction done and what is being done.

    Raises:
      ModelNotInstalledError: a known model whose weights are not here; the message says how to
        get them.
      CheckpointError: the checkpoint cannot be read or trusted, or does not fit into memory.
      ValueError: an argument that is not available.
    """
    with uncollected():
        import jax.numpy as jnp

        from gemma_nb import executables
        from gemma_nb.model import GemmaTransformer
        from gemma_nb.nn import Transformer

        dtype, upcast = checkpoint.dtype_name(dtype), upcast_activations_to_float32
        upcast = settings.flag("upcast_activations_to_float32", True if upcast is None else upcast)
        checkpoint.use_compilation_cache()
        executables.begin_prefetch(repr((str(source), dtype)))
        config, params, info, tokenizer = checkpoint.load_params(
            source,
            dtype=dtype,
            mesh=mesh,
            revision=revision,
            step=step,
            force=force,
            progress=progress,
        )
        own = params["embedder"]["input_embedding"].dtype
        activations = jnp.float32 if upcast else own
        model = GemmaTransformer(
            config=config,
            transformer=Transformer(config, dtype=activations),
            params=params,
            info=info,
            storage="int8" if dtype == "int8" else "exact",
        )
    return model, tokenizer
