"""Traces on disk: netCDF or Zarr, through xarray."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_nb.checkpoints import kinds
from gemma_nb.config import Global, LayerSpec, Sliding, TransformerConfig
from gemma_nb.interp.labels import Labels

if TYPE_CHECKING:
    import xarray

_FORMAT = "gemma_nb trace 1"
_ENDINGS = (".nc", ".zarr")


def to_dataset(labels: Labels, data: Mapping[str, xarray.DataArray]) -> xarray.Dataset:
    """One dataset that says everything: sites, tokens, turns, configuration and interventions.

    Sites may hold other layers, positions or heads than each other, so each has axes of its own:
    "attention.layer", "attention.query" and so on.
    """
    import xarray

    held = {}
    for name, array in data.items():
        own = array.rename({dim: f"{name}.{dim}" for dim in array.dims})
        plain = own.drop_vars([c for c in own.coords if c not in own.dims])
        held[name] = plain.drop_attrs().assign_attrs(site=array.attrs.get("site", ""))
    everything: dict[str, Any] = {
        **held,
        "token": ("position", np.array(labels.tokens, dtype=np.str_)),
        "token_id": ("position", labels.ids),
    }
    if labels.turns is not None and labels.roles is not None:
        everything["turn"] = ("position", labels.turns)
        everything["role"] = ("position", np.array(labels.roles, dtype=np.str_))
    attrs = {
        "format": _FORMAT,
        "model": str(labels.attrs.get("model", "")),
        "interventions": json.dumps(labels.attrs.get("interventions", "").splitlines()),
        "config": json.dumps(_fields(labels.config)),
    }
    return xarray.Dataset(everything, attrs=attrs)


def save(dataset: xarray.Dataset, path: str | os.PathLike[str]) -> None:
    """Writes a dataset of `to_dataset` in the format that the path's ending names."""
    path = Path(path)
    if path.suffix not in _ENDINGS:
        raise ValueError(f"a trace is saved as {' or '.join(_ENDINGS)}, got {path.name!r}")
    if path.suffix == ".zarr":
        _need_zarr()
        # Zarr 3 has no fixed form of strings yet.
        dataset.to_zarr(path, mode="w", zarr_format=2)
        return
    # netCDF 3 knows no half precision, and scipy writes it without another library.
    halves = {
        n: x.astype(np.float32).assign_attrs(**x.attrs, dtype="float16")
        for n, x in dataset.items()
        if x.dtype == np.float16
    }
    dataset.assign(halves).to_netcdf(path, engine="scipy")


def load(path: str | os.PathLike[str]) -> tuple[Labels, dict[str, xarray.DataArray]]:
    """Labels and arrays that `save` wrote.

    Raises:
      ValueError: the file is no such trace.
      FileNotFoundError: it is not there.
    """
    import xarray

    path = Path(path)
    if path.suffix not in _ENDINGS:
        raise ValueError(f"a trace is saved as {' or '.join(_ENDINGS)}, got {path.name!r}")
    if path.suffix == ".zarr":
        _need_zarr()
    how: dict[str, Any] = {"engine": "zarr" if path.suffix == ".zarr" else "scipy"}
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with xarray.open_dataset(path, **how) as opened:
            dataset = opened.load()
    except Exception as error:  # each engine, and each way of being broken, has its own
        problem = kinds.in_place_of(path) or error
        raise ValueError(f"{path.name} is no trace that gemma_nb saved: {problem}") from error
    if dataset.attrs.get("format") != _FORMAT:
        raise ValueError(f"{path.name} is no trace that gemma_nb saved")
    labels = Labels(
        config=_config(json.loads(dataset.attrs["config"])),
        ids=dataset["token_id"].values.astype(np.int32),
        tokens=tuple(map(str, dataset["token"].values)),
        turns=dataset["turn"].values.astype(np.int32) if "turn" in dataset else None,
        roles=tuple(map(str, dataset["role"].values)) if "role" in dataset else None,
        attrs={
            "model": dataset.attrs["model"],
            "interventions": "\n".join(json.loads(dataset.attrs["interventions"])),
        },
    )
    data = {}
    for name, array in dataset.items():
        if array.dims and str(array.dims[0]).startswith(f"{name}."):
            data[str(name)] = _labelled(labels, str(name), array)
    return labels, data


def _need_zarr() -> None:
    """Raises ImportError, with what to do, where the zarr library is not installed."""
    if importlib.util.find_spec("zarr") is None:
        raise ImportError(
            "traces in .zarr folders need the zarr library: pip install zarr.  "
            "A trace in a .nc file needs nothing more"
        )


def _labelled(labels: Labels, name: str, array: xarray.DataArray) -> xarray.DataArray:
    dims = [str(dim).removeprefix(f"{name}.") for dim in array.dims]

    def held(*names: str) -> list[int] | None:
        """The indices along the first of these axes that there is."""
        for dim in names:
            if dim in dims:
                return [int(i) for i in array[f"{name}.{dim}"].values]
        return None

    return labels.array(
        array.values.astype(array.attrs.get("dtype", array.dtype)),
        dims,
        name,
        {"site": array.attrs.get("site", "")},
        layers=held("layer"),
        positions=held("position", "query"),
        heads=held("head", "kv_head"),
    )


def _fields(config: TransformerConfig) -> dict[str, Any]:
    """A configuration as JSON has it; the inverse of `_config`."""
    layers = [spec.fields() | {"kind": vars(spec.kind)} for spec in config.layers]
    return dataclasses.asdict(config) | {"layers": layers}


def _config(fields: dict[str, Any]) -> TransformerConfig:
    def spec(layer: Mapping[str, Any]) -> LayerSpec:
        kind = Sliding(layer["kind"]["window"]) if layer["kind"] else Global()
        return LayerSpec(**{**layer, "kind": kind})

    return TransformerConfig(**{**fields, "layers": tuple(map(spec, fields["layers"]))})
