"""What fits, on machines of other sizes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gemma_nb import presets
from gemma_nb.checkpoints import memory
from gemma_nb.errors import CheckpointError

GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets what the operating system and the container say."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)

    def of(*, total=0, free=0, limit="", used=0, droppable=0):
        monkeypatch.setattr(memory, "_physical", lambda: total)
        known = {"MemTotal": total, "MemAvailable": free} if free else {}
        monkeypatch.setattr(memory, "_meminfo", lambda: known)
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {droppable}\n")

    return of


def test_bytes_are_read_as_people_do():
    assert [memory.bytes_text(n) for n in (0, 999, 1000, 12_345, 536_870_912, 54 * GB)] == [
        *("0.00 B", "999 B", "1.00 kB", "12.3 kB", "537 MB", "54.0 GB")
    ]


def test_parameters_take_their_dtype_and_loading_a_little_more():
    config = presets.GEMMA3_1B
    assert memory.param_bytes(config, "bfloat16") == 2 * config.num_params()
    assert memory.param_bytes(config, "float32") == 4 * config.num_params()
    for dtype in memory.ITEM_BYTES:
        assert 1 < memory.loading_bytes(config, dtype) / memory.param_bytes(config, dtype) <= 1.3


def test_this_machine_says_how_much_memory_it_has():
    assert 2**28 < memory.available() <= memory.total() < 2**50


@pytest.mark.parametrize(
    ("said", "total", "free"),
    [
        ({"total": 16 * GB, "free": 9 * GB, "limit": "max"}, 16 * GB, 9 * GB),
        ({"total": 16 * GB, "free": 9 * GB, "limit": 4 * GB, "used": GB}, 4 * GB, 3 * GB),
        # Cached pages of files count as used, and are given up when they are needed.
        (
            {"total": 16 * GB, "free": 9 * GB, "limit": 4 * GB, "used": 4 * GB, "droppable": GB},
            *(4 * GB, GB),
        ),
        ({"total": 16 * GB}, 16 * GB, 16 * GB),  # no /proc: all of it may be free
        ({}, 0, 0),
    ],
)
def test_the_container_counts_as_well(machine, said, total, free):
    machine(**said)
    assert (memory.total(), memory.available()) == (total, free)


def test_what_cannot_fit_is_refused_with_the_numbers(machine):
    machine(total=8 * GB, free=4 * GB)
    memory.refuse_what_cannot_fit(presets.GEMMA3_1B, "bfloat16", name="gemma3-1b")
    with pytest.raises(CheckpointError) as caught:
        memory.refuse_what_cannot_fit(presets.GEMMA3_1B, "float32", name="gemma3-1b")
    message = str(caught.value)
    for part in ("gemma3-1b: loading 1.00B parameters in float32", "5.20 GB", "4.00 GB free"):
        assert part in message
    for remedy in ('dtype="bfloat16"', "gnb.list_models()", "mesh=", "force=True"):
        assert remedy in message


def test_a_machine_that_says_nothing_is_tried(machine):
    request = (presets.GEMMA3_27B, "float32")
    machine(total=GB, free=GB)
    with pytest.raises(CheckpointError, match="gemma3-27b"):
        memory.refuse_what_cannot_fit(*request, name="gemma3-27b")
    machine()
    assert memory.refuse_what_cannot_fit(*request, name="gemma3-27b") is None


def accelerator(free: int) -> SimpleNamespace:
    stats = {"bytes_limit": free + GB, "bytes_in_use": GB}
    return SimpleNamespace(platform="tpu", memory_stats=lambda: stats)


def test_on_accelerators_their_own_memory_counts(machine):
    machine(total=GB, free=GB)  # the host passes parameters on one by one
    config = presets.GEMMA3_4B  # 7.8 GB in bfloat16
    four = SimpleNamespace(devices=np.array([accelerator(2 * GB) for _ in range(4)]))
    memory.refuse_what_cannot_fit(config, "bfloat16", name="gemma3-4b", mesh=four)
    two = SimpleNamespace(devices=four.devices[:2])
    with pytest.raises(CheckpointError, match=r"7.76 GB, and 2 tpu devices have 4.00 GB free"):
        memory.refuse_what_cannot_fit(config, "bfloat16", name="gemma3-4b", mesh=two)
