"""The benchmark's arithmetic; its timings are nobody's test."""

from __future__ import annotations

import pytest

from tests.bench.floor import Distance, described, distances
from tests.bench.names import HF_BF16, HF_F32, LLAMA, OURS
from tests.bench.reply import Reply
from tests.bench.report import Quantity, table

RATE = Quantity("decode, tokens/s", {OURS: [30.0, 10.0, 29.0], HF_BF16: [10.0, 14.5, 20.0]}, True)
DURATION = Quantity("load, s", {OURS: [2.0], HF_BF16: [5.0], HF_F32: []}, False)


def test_medians_and_advantages() -> None:
    assert RATE.median(OURS) == 29
    assert RATE.advantage(HF_BF16) == 2
    assert DURATION.advantage(HF_BF16) == 2.5
    assert DURATION.advantage(HF_F32) is None
    assert RATE.advantage(OURS) is None
    assert RATE.spread() == pytest.approx(19 / 29)


def test_table_has_a_column_for_who_was_measured_and_a_line_for_who_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.bench.report.installed", lambda name: name != LLAMA)
    lines = table([RATE, DURATION]).splitlines()
    assert lines[0].split() == ["gemma_nb", "HF", "bf16"]
    assert "29.0" in lines[1]
    assert "2.00x" in lines[2]
    assert "2.50x" in lines[4]
    assert lines[5] == "llama.cpp: not installed"


def test_the_first_token_is_not_decoding() -> None:
    assert Reply.of(1.0, [5.0, 5.5, 6.0], 3) == (5.0, 0.5)
    with pytest.raises(RuntimeError, match="asked for 4 tokens, got 3"):
        Reply.of(1.0, [5.0, 5.5, 6.0], 4)


def test_the_distance_from_the_floor() -> None:
    far = distances(1e9, {OURS: 10_000_000, HF_BF16: 5}, {OURS: 50.0})
    assert far[OURS] == Distance(10_000_000, floor=10.0, taken=20.0)
    assert "reads 10 MB, 10.0 ms at least, and takes 20.0 ms: 2.00 times" in described(1e9, far)
