"""README shows what was measured."""

from __future__ import annotations

import json

import pytest

from tests.bench.names import GM, HF_BF16, OURS
from tests.bench.publish import BEGIN, END, PLOT, README, plot, rates, replaced, section
from tests.bench.report import DECODE, RESULTS, Quantity, prefill_of, record

MEASURED = {
    "conditions": "a machine",
    "floor": {"bytes per second": 2e10, OURS: {"floor": 10.0, "times": 2.5}},
    "quantities": record(
        [
            Quantity(DECODE, {OURS: [40.0, 39.0, 41.0], GM: [20.0, 16.0, 22.0]}, True),
            Quantity(prefill_of(256), {OURS: [1200.0], HF_BF16: [2400.0]}, True),
            Quantity("alone, s", {OURS: [9.5]}, False),
        ]
    ),
}


def test_readme_shows_the_results_that_are_kept() -> None:
    text = README.read_text(encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert replaced(text, section(results)) == text, "run python -m tests.bench.publish"
    assert PLOT.exists()


def test_a_row_for_everybody_and_a_column_for_what_is_compared() -> None:
    assert rates(MEASURED) == [
        f"|  | {DECODE} | {prefill_of(256)} | a token, times its floor |",
        "|---|---:|---:|---:|",
        "| **gemma_nb** | 40 | 1,200 | 2.50 |",
        "| transformers, bfloat16 |  | 2,400 (0.50x) |  |",
        "| gm, bfloat16 | 20 (2.00x) |  |  |",
    ]


def test_the_plot_has_bars_whiskers_and_floors() -> None:
    figure = plot(MEASURED)
    decode, prefill = figure.axes
    assert [bar.get_width() for bar in decode.patches] == [40, 20]
    assert [bar.get_width() for bar in prefill.patches] == [1200, 2400]
    (floor,) = [line for line in decode.lines if list(line.get_xdata()) == [100.0, 100.0]]
    assert floor.get_xdata()[0] < decode.get_xlim()[1]
    assert [label.get_text() for label in decode.get_yticklabels()] == [
        "gemma_nb",
        "transformers, bfloat16",
        "gm, bfloat16",
    ]


def test_what_stands_around_the_results_stays() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replaced(text, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="unpack"):
        replaced("no marks", "new")
