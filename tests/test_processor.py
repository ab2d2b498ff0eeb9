"""What is read of the processor."""

import pathlib
import subprocess
import sys
import types

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


# One core of an ARM server each, as Linux tells of them.
ARM = "processor\t: {}\nBogoMIPS\t: {}\nFeatures\t: {}\nCPU implementer\t: 0x41\nCPU part\t: {}\n\n"
NEOVERSE_N1 = "fp asimd aes atomics", "0xd0c"
NEOVERSE_V1 = "fp asimd aes atomics sve bf16", "0xd40"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param(AMD.format(""), AMD.format("avx512f"), False, id="x86"),
        pytest.param(AMD, AMD.replace("Authentic", "Another"), False, id="of another make"),
        pytest.param(
            ARM.format(0, 1, *NEOVERSE_N1), ARM.format(0, 1, *NEOVERSE_V1), False, id="ARM"
        ),
        pytest.param(
            ARM.format(0, 1, *NEOVERSE_N1), ARM.format(0, 2, *NEOVERSE_N1), True, id="a clock"
        ),
        pytest.param(
            ARM.format(0, 1, "fp", "0xd05"),
            ARM.format(0, 1, "fp", "0xd05") + ARM.format(1, 1, "fp", "0xd0a"),
            False,
            id="large and small cores",
        ),
        pytest.param("isa\t: rv64imafdc\n", "isa\t: rv64imafdcv\n", False, id="RISC-V"),
        pytest.param("cpu\t: POWER9\n", "cpu\t: POWER10\n", False, id="POWER"),
    ],
)
def test_processors_that_can_do_different_things_are_told_apart(told, one, other, same):
    """By the fields that the kernel writes for each architecture into /proc/cpuinfo."""
    found = []
    for text in (one, other):
        told(text)
        found.append(processor.described())
    assert (found[0] == found[1]) is same


def test_macos_and_windows_are_asked_about_instructions(told, monkeypatch):
    told(None)
    says = "hw.optional.arm.FEAT_BF16: 1\nmachdep.cpu.brand_string: Apple M2\n"
    done = subprocess.CompletedProcess([], 0, stdout=says)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(processor.platform, "processor", lambda: "arm")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "FEAT_BF16: 1" in processor.described()
    assert "Apple M2" in processor.described()
    has = types.SimpleNamespace(IsProcessorFeaturePresent=lambda number: number in (10, 40))
    windll = types.SimpleNamespace(kernel32=has)
    monkeypatch.setattr(processor.ctypes, "windll", windll, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert processor.described().splitlines()[-2:] == ["10", "40"]
