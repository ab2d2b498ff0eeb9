"""README's plot and tables from assets/benchmarks.json: `python -m tests.bench.publish`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gemma_nb.plots.colors import BLUE, INK, OTHER, SKY, VERMILION
from gemma_nb.plots.figure import NORMAL, SMALL, bare, headline
from tests.bench.names import (
    GM,
    GM_STREAM,
    HF_BF16,
    HF_F32,
    LLAMA,
    NAMES,
    OURS,
    OURS_INT8,
    TRANSFORMER_LENS,
)
from tests.bench.report import DECODE, RESULTS, Quantity, prefill_of

PLOT = RESULTS.with_suffix(".svg")
README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- made by make bench -->", "<!-- end of what make bench makes -->"
LABELS = {
    OURS: "gemma_nb",
    OURS_INT8: "gemma_nb, int8",
    LLAMA: "llama.cpp, Q4_K_M",
    HF_BF16: "transformers, bfloat16",
    HF_F32: "transformers, float32",
    GM: "gm, bfloat16",
    GM_STREAM: "gm, streaming",
    TRANSFORMER_LENS: "TransformerLens",
}
COLORS = {OURS: BLUE, OURS_INT8: SKY}
PANELS = {
    DECODE: "Decoding, tokens/s",
    prefill_of(64): "Reading a prompt of 64, tokens/s",
    prefill_of(256): "Reading a prompt of 256, tokens/s",
}


def quantities(recorded: Sequence[Mapping[str, Any]]) -> dict[str, Quantity]:
    """What `report.record` made, by title."""
    return {q["title"]: Quantity(q["title"], q["rounds"], q["higher_is_better"]) for q in recorded}


def plot(results: Mapping[str, Any]) -> Figure:
    """Medians as bars, from the slowest to the fastest round a whisker; a panel per rate."""
    known = quantities(results["quantities"])
    panels = [title for title in PANELS if title in known]
    names = [name for name in NAMES if any(name in known[title].values for title in panels)]
    figure = Figure(figsize=(1.5 + 2.5 * len(panels), 0.75 + 0.25 * len(names)), facecolor="white")
    figure.subplots_adjust(
        left=1.5 / figure.get_figwidth(),
        right=0.985,
        top=1 - 0.35 / figure.get_figheight(),
        bottom=0.36 / figure.get_figheight(),
        wspace=0.08,
    )
    for i, title in enumerate(panels):
        ax = figure.add_subplot(1, len(panels), i + 1)
        _bars(ax, known[title], names)
        headline(ax, PANELS[title])
        ax.set_yticks(range(len(names)), [LABELS[name] for name in names] if i == 0 else [])
        for label, name in zip(ax.get_yticklabels(), names, strict=False):
            label.set_fontsize(NORMAL)
            label.set_color(INK)
            label.set_weight("bold" if name in COLORS else "normal")
        if title == DECODE:
            _floors(ax, results["floor"], names)
    return figure


def _bars(ax: Axes, quantity: Quantity, names: Sequence[str]) -> None:
    medians = quantity.medians()
    most = max(max(quantity.values[name]) for name in medians)
    for y, name in enumerate(names):
        if name not in medians:
            continue
        middle, rounds = medians[name], quantity.values[name]
        ax.barh(y, middle, height=0.66, color=COLORS.get(name, OTHER))
        spread = [[middle - min(rounds)], [max(rounds) - middle]]
        ax.errorbar(middle, y, xerr=spread, color=INK, linewidth=0.9, capsize=2)
        text = f"{middle:,.0f}" if middle >= 10 else f"{middle:.1f}"
        ax.annotate(
            text,
            (max(rounds), y),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=INK,
        )
    ax.set_xlim(0, 1.18 * most)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xticks([])
    bare(ax)


def _floors(ax: Axes, floors: Mapping[str, Any], names: Sequence[str]) -> None:
    """A mark at the rate that reading the weights from memory alone would allow."""
    for y, name in enumerate(names):
        if name in floors:
            most = 1e3 / floors[name]["floor"]
            ax.plot([most, most], [y - 0.33, y + 0.33], color=VERMILION, linewidth=1.4)
            ax.set_xlim(0, max(ax.get_xlim()[1], 1.04 * most))
    ax.annotate(
        "mark: what reading from memory allows",
        (0, 0),
        (0, -8),
        xycoords="axes fraction",
        textcoords="offset points",
        va="top",
        fontsize=SMALL,
        color=VERMILION,
    )


def _cell(quantity: Quantity, name: str) -> str:
    """A median, and in brackets how many times better ours is."""
    middle, times = quantity.median(name), quantity.advantage(name)
    if middle is None:
        return ""
    number = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
    return number if times is None else f"{number} ({times:.2f}x)"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]


def rates(results: Mapping[str, Any]) -> list[str]:
    """A Markdown table: everybody's medians and distance from what memory allows."""
    known = list(quantities(results["quantities"]).values())
    shown = [q for q in known if len(q.values) > 1]
    names = [name for name in NAMES if any(q.values.get(name) for q in shown)]
    floors = results["floor"]
    head = ["", *(q.title for q in shown), "a token, times its floor"]
    rows = [
        [
            f"**{LABELS[name]}**" if name in COLORS else LABELS[name],
            *(_cell(q, name) for q in shown),
            f"{floors[name]['times']:.2f}" if name in floors else "",
        ]
        for name in names
    ]
    return _table([head, *rows])


def inside(results: Mapping[str, Any]) -> list[str]:
    """A Markdown table: looking inside beside TransformerLens."""
    known = quantities(results["quantities"]).values()
    names = (OURS, TRANSFORMER_LENS)
    head = ["", *(LABELS[name] for name in names)]
    return _table([head, *([q.title, *(_cell(q, name) for name in names)] for q in known)])


def section(results: Mapping[str, Any]) -> str:
    """What README says between BEGIN and END."""
    rounds = max(len(v) for q in results["quantities"] for v in q["rounds"].values())
    speed = results["floor"]["bytes per second"] / 1e9
    conditions = (
        f"Medians of up to {rounds} interleaved rounds; whiskers are the slowest and the fastest "
        "one. In brackets: how many times better `gemma_nb` is. The floor of a token is what "
        f"reading its weights from memory takes, at {speed:.0f} GB/s here. Measured on "
        f"{results['conditions']}."
    )
    lines = [
        f"![Speed beside other implementations](assets/{PLOT.name})",
        "",
        *rates(results),
        "",
        *textwrap.wrap(conditions, 100, break_on_hyphens=False),
    ]
    if "inside" in results:
        lines += ["", "Looking inside, on the same float32 weights:", ""]
        lines += inside(results["inside"])
    return "\n".join(lines)


def replaced(text: str, made: str) -> str:
    """`text` with `made` between BEGIN and END."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    """Writes the plot and README."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    # The same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "gemma_nb"}):
        plot(results).savefig(PLOT, metadata={"Date": None})
    text = README.read_text(encoding="utf-8")
    README.write_text(replaced(text, section(results)), encoding="utf-8")
    print(f"written to {PLOT.name} and {README.name}")


if __name__ == "__main__":
    main()
