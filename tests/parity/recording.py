"""The file of recorded reference outputs: `data/recorded.npz`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_nb.checkpoints.layout import flatten
from tests.parity.cases import DATA

PATH = DATA / "recorded.npz"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What is kept of the reference for one case.

    Attributes:
      tokens: (T,) int32, the text.
      sketch: of the reference in float64, see `measure.sketch`; stored in float32.
      noise: `measure.compare` of the reference in float32 with itself in float64, and
        `attention_whole` (L, N), the same for the largest difference over whole heads.
      fingerprint: of the random weights; empty for a released model.
    """

    tokens: np.ndarray
    sketch: Mapping[str, np.ndarray]
    noise: Mapping[str, np.ndarray]
    fingerprint: str = ""


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes and bits of the parameters."""
    digest = hashlib.sha256()
    for path, value in sorted(flatten(params).items()):
        digest.update(f"{'/'.join(path)} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def save(cases: Mapping[str, Recorded], versions: Mapping[str, str]) -> None:
    """Writes the recording."""
    arrays: dict[str, np.ndarray] = {}
    for name, case in cases.items():
        arrays[f"{name}/tokens"] = case.tokens
        for group in ("sketch", "noise"):
            for key, value in getattr(case, group).items():
                dtype = np.int32 if value.dtype.kind == "i" else np.float32
                arrays[f"{name}/{group}/{key}"] = np.asarray(value, dtype)
    notes = {"versions": versions, "fingerprints": {n: c.fingerprint for n, c in cases.items()}}
    np.savez_compressed(PATH, notes=np.array(json.dumps(notes)), **arrays)  # type: ignore[arg-type]


def versions() -> dict[str, str]:
    """Of the libraries that the recording was made with."""
    with np.load(PATH) as file:
        return json.loads(str(file["notes"]))["versions"]


def load(name: str) -> Recorded:
    """The recording of one case.

    Raises:
      KeyError: nothing was recorded for it.
    """
    with np.load(PATH) as file:

        def group(kind: str) -> dict[str, np.ndarray]:
            prefix = f"{name}/{kind}/"
            return {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}

        marks = json.loads(str(file["notes"]))["fingerprints"]
        return Recorded(file[f"{name}/tokens"], group("sketch"), group("noise"), marks[name])
