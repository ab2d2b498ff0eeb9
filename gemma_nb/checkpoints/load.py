"""Configuration, official params and tokenizer of a checkpoint, from a name or a path."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gemma_nb import presets, settings
from gemma_nb.cache import cache_dir, limit_bytes
from gemma_nb.checkpoints import (
    arrays,
    catalog,
    chat_templates,
    convert,
    converted,
    folders,
    layout,
    memory,
    orbax_steps,
)
from gemma_nb.checkpoints.convert import Report
from gemma_nb.checkpoints.orbax import OrbaxFolder
from gemma_nb.checkpoints.safetensors import HuggingFaceFolder
from gemma_nb.checkpoints.sources import Source, resolve
from gemma_nb.config import TransformerConfig
from gemma_nb.errors import CheckpointError
from gemma_nb.presets import ModelInfo

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gemma_nb.text.tokenizer import Tokenizer
    from gemma_nb.typing import Params

Progress = Report | Literal[False] | None
Loaded = tuple[TransformerConfig, "Params", ModelInfo, "Tokenizer"]

_log = logging.getLogger(__name__)


def load_params(
    source: str | os.PathLike[str] = "gemma3-270m",
    *,
    dtype: str | None = None,
    mesh: Mesh | Literal["auto"] | None = None,
    revision: str | None = None,
    step: int | None = None,
    force: bool = False,
    progress: Progress = None,
) -> Loaded:
    """Configuration, official params as JAX arrays, facts and tokenizer of a checkpoint.

    Args and errors are those of `gemma_nb.loading.load`.
    """
    from gemma_nb import executables, placement

    settings.path("source", source, "a released name or a path")
    if revision is not None and not isinstance(revision, str):
        settings.refuse("revision", "a string or None", revision)
    if progress is True:
        progress = None
    if not (progress is None or progress is False or callable(progress)):
        settings.refuse("progress", "None, False or a function", progress)
    force = settings.flag("force", False if force is None else force)
    name, where = _stored_dtype(dtype_name(dtype)), placement.resolve(mesh)
    try:
        job = _Job(resolve(source, revision, step), name, where, progress, force)
        with executables.ours():
            return job.gguf() if job.source.format == "GGUF" else job.folder()
    except OSError as error:  # of a folder that nobody may look into, or a file that vanished
        if error.filename is None:  # not of a file: a broken pipe under the progress bar
            raise
        raise folders.unreadable(error.filename, error) from error


@dataclasses.dataclass(frozen=True)
class _Job:
    """One load: what is loaded, and what it is turned into."""

    source: Source
    dtype: str
    mesh: Mesh | None
    progress: Progress
    force: bool

    def gguf(self) -> Loaded:
        """Load a GGUF file by way of the cache of converted weights."""
        from gemma_nb.text.tokenizer import Tokenizer

        def vocabulary(metadata: dict[str, Any]) -> tuple[bytes, int]:
            with _tokenizer_errors(self.source.name):
                tokenizer = Tokenizer.from_gguf(metadata, self.source.name)
            return tokenizer.model_proto, tokenizer.vocab_size

        config, ready = convert.read(
            self.source,
            self.dtype,
            vocabulary=vocabulary,
            check=self._check_memory,
            reporter=functools.partial(_reporter, self.source.name, self.progress, terms=True),
        )
        # On CPU this takes over the mapped memory without a copy.
        params = self._placed(ready.params.items(), config)
        # Instruction-tuned checkpoints come with a chat template; base ones have none.
        templates = chat_templates.of_gguf(ready.metadata)
        title = str(ready.metadata.get("general.name") or "")
        return (
            config,
            params,
            self._info(config, templates, title=title),
            Tokenizer.from_bytes(ready.tokenizer),
        )

    def folder(self) -> Loaded:
        """Straight from the folder, one parameter after the other."""
        from gemma_nb.text import hugging_face

        [folder] = self.source.files
        files = folders.tokenizer_files(folder)
        reader: OrbaxFolder | HuggingFaceFolder
        orbax = self.source.format == "Orbax"
        reader = OrbaxFolder(folder) if orbax else HuggingFaceFolder(folder)
        with _tokenizer_errors(files.model_name):
            tokenizer = hugging_face.tokenizer(files, reader.config.num_embed)
        if tokenizer.vocab_size > reader.config.num_embed:
            raise CheckpointError(
                f"{self.source.name}: the tokenizer has {tokenizer.vocab_size:,} pieces, the "
                f"embedding {reader.config.num_embed:,} rows; use the tokenizer of this checkpoint"
            )
        if isinstance(reader, HuggingFaceFolder):
            reader.keep_rows(tokenizer.vocab_size)
        config = reader.config
        self._check_memory(config)
        with _reporter(self.source.name, self.progress, terms=False) as report:
            read = reader.params(converted.DTYPES[self.dtype])
            with np.errstate(over="ignore", invalid="ignore"):  # refused by name, not warned of
                params = self._placed(_checked(read, config, self.source.name, report), config)
        info = self._info(config, chat_templates.of_folder(folder), reader.tuning)
        return config, params, info, tokenizer

    def _check_memory(self, config: TransformerConfig) -> None:
        if not self.force:
            memory.refuse_what_cannot_fit(config, self.dtype, name=self.source.name, mesh=self.mesh)

    def _placed(
        self, params: Iterable[tuple[layout.Path, np.ndarray]], config: TransformerConfig
    ) -> Params:
        """Each parameter on its devices, before the next one is read."""

        from gemma_nb import placement

        where = placement.shardings(config, self.mesh)
        return layout.nest((path, placement.put(a, where.get(path))) for path, a in params)

    def _info(
        self,
        config: TransformerConfig,
        templates: presets.ChatTemplates | None,
        tuning: presets.Tuning | None = None,
        title: str = "",
    ) -> ModelInfo:
        """Facts that the checkpoint says about itself, unless more is known."""
        if self.source.info is not None:
            return self.source.info
        tuning = tuning or ("base" if templates is None else "instruction")
        size = presets.name_of(config)
        suffix = "-it" if tuning == "instruction" else ""
        [first, *_] = self.source.files
        own = orbax_steps.own_name(first) if self.source.format == "Orbax" else first.stem
        name = f"{size}{suffix}" if size else own
        # Two files of one size are told apart by where they lie.
        where = "/".join(Path(self.source.name).parts[-2:])
        title = f"{title or name} ({where})"
        info = catalog.describe(name, title, tuning, source=self.source.name)
        return dataclasses.replace(info, chat_templates=templates)


def use_compilation_cache() -> None:
    """Store compiled programs across processes, unless the user has arranged that already.

    Raises:
      ValueError: a variable that limits the cache is no number (see `gemma_nb.cache`).
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from gemma_nb.executables import jax_cache

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    for part in ("weights", "programs", "jax"):
        limit_bytes(part)  # a limit that is none is said now, not in the midst of a reply
    folder = cache_dir() / "jax"
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:  # XLA takes names in UTF-8 only
        _log.info("compiled programs are not kept in %r: %s", folder, error)
        return
    if not jax_cache.use(folder):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX's default of a second leaves out programs that a start of the app waits for.
    if jax.config.jax_persistent_cache_min_compile_time_secs == 1.0:  # type: ignore[attr-defined]
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.03)
    # JAX decides at the first compilation whether there is a cache; that may have been before now.
    compilation_cache.reset_cache()


def dtype_name(dtype: Any) -> str | None:
    """A dtype's name, where it is given as one of numpy's or JAX's."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    if isinstance(dtype, type | np.dtype):
        with contextlib.suppress(TypeError):
            return np.dtype(dtype).name
    settings.refuse("dtype", "'bfloat16', 'float32', 'int8' or None", dtype)


def _stored_dtype(dtype: str | None) -> str:
    if dtype in (None, "int8"):
        return "bfloat16"
    if dtype not in converted.DTYPES:
        raise ValueError(f"expected dtype 'bfloat16', 'float32' or 'int8', got {dtype!r}")
    return dtype


@contextlib.contextmanager
def _tokenizer_errors(name: str) -> Iterator[None]:
    """Whatever libraries stumble over in a vocabulary becomes a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # protobuf's, SentencePiece's and Python's own share no base
        raise CheckpointError(
            f"{name}: the tokenizer is damaged ({type(error).__name__}: {error}); download the "
            "file again"
        ) from error


def _checked(
    params: Iterable[tuple[layout.Path, np.ndarray]],
    config: TransformerConfig,
    name: str,
    report: Report,
) -> Iterator[tuple[layout.Path, np.ndarray]]:
    """`params` as they come, refused where they hold NaN."""
    done, total = 0, config.num_params()
    report(0.0, "Reading the weights")
    for path, array in params:
        arrays.check_finite(array, path, name)
        yield path, array
        done += array.size
        report(min(done / total, 1.0), "Reading the weights")


@contextlib.contextmanager
def _reporter(name: str, progress: Progress, *, terms: bool) -> Iterator[Report]:
    """A function to report to; with `terms` it says whose terms the weights are under, once."""
    _log.info(catalog.TERMS)
    if callable(progress):
        if terms:
            progress(0.0, catalog.TERMS)
        yield progress
    elif progress is None:
        from tqdm.auto import tqdm

        if terms:
            print(catalog.TERMS, file=sys.stderr)
        shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
        # What is over in a moment needs no bar.
        delay = 0 if terms else 1
        with tqdm(total=1.0, desc=name, bar_format=shape, delay=delay) as bar:

            def report(fraction: float, text: str) -> None:
                bar.set_description_str(f"{name}: {text}", refresh=False)
                bar.update(fraction - bar.n)

            yield report
    else:
        yield lambda fraction, text: None
