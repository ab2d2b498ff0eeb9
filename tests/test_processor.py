"""What is read of the processor."""

import pathlib

import pytest

from gemma_nb import processor

# Two cores of each, as Linux tells of them.
AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 {}\n\nvendor_id\t: Other\nflags\t\t: none\n"
INTEL = AMD.replace("AuthenticAMD", "GenuineIntel")


@pytest.fixture
def told(monkeypatch):
    def tell(text):
        def read_text(self, **_):
            if text is None:
                raise FileNotFoundError(self)
            return text

        monkeypatch.setattr(pathlib.Path, "read_text", read_text)
        processor._said.cache_clear()

    yield tell
    monkeypatch.undo()
    processor._said.cache_clear()


@pytest.mark.parametrize(
    ("text", "unit", "bfloat16", "streams"),
    [
        pytest.param(AMD.format(""), False, False, (4, 4), id="Zen 3"),
        pytest.param(AMD.format("avx512f avx512_bf16"), False, True, (2, 1), id="Zen 4"),
        pytest.param(
            INTEL.format("avx512f avx512_bf16 amx_bf16"), True, True, (4, 8), id="Sapphire Rapids"
        ),
        pytest.param(
            INTEL.format("avx512f avx512_bf16"), False, False, (4, 8), id="without its unit"
        ),
        pytest.param(INTEL.format(""), False, False, (1, 1), id="Intel without AVX-512"),
        pytest.param("processor\t: 0\nBogoMIPS\t: 50.00\n", False, False, (1, 1), id="arm64"),
        pytest.param(None, False, False, (1, 1), id="not Linux"),
    ],
)
def test_processors(told, text, unit, bfloat16, streams):
    told(text)
    assert processor.has_matrix_unit() is unit
    assert processor.prefers_bfloat16() is bfloat16
    assert processor.streams() == streams
