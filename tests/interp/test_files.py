"""Files that are no traces, and what a trace keeps of half precision."""

import numpy as np
import pytest

import gemma_nb as gnb


@pytest.mark.parametrize("ending", [".nc", ".zarr"])
def test_half_precision_is_read_back(tiny_model, tmp_path, ending):
    trace = gnb.trace(tiny_model[0], np.arange(10, 20), sites=("attention",), dtype="float16")
    trace.save(tmp_path / f"half{ending}")
    found = gnb.Trace.load(tmp_path / f"half{ending}")
    assert found.attention.dtype == np.float16
    assert found.attention.identical(trace.attention)


def test_files_that_are_no_traces_are_refused(tiny_model, tmp_path):
    (tmp_path / "text.nc").write_text("hello")
    (tmp_path / "empty.zarr").mkdir()
    trace = gnb.trace(tiny_model[0], np.arange(10, 20))
    trace.attention.to_netcdf(tmp_path / "map.nc", engine="scipy")
    for name in ("text.nc", "empty.zarr", "map.nc"):
        with pytest.raises(ValueError, match=f"{name} is no trace that gemma_nb saved"):
            gnb.Trace.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.nc does not exist"):
        gnb.Trace.load(tmp_path / "none.nc")
