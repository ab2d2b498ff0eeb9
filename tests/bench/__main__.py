"""`python -m tests.bench [--quick]`: measures and prints the table."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import gemma_nb as gnb
from tests.bench import startup
from tests.bench.bandwidth import read_bandwidth
from tests.bench.contestants import (
    Contestant,
    contestants,
    seconds_of,
    seconds_per_token,
    settle,
)
from tests.bench.names import LLAMA, NAMES, OURS, OURS_INT8, installed
from tests.bench.report import Quantity, conditions, keep, record, table

PROMPTS = (64, 256)  # tokens


def rates(made: Mapping[str, Contestant], rounds: int, count: int) -> list[Quantity]:
    """Decoding and prefill, in interleaved rounds after one that warms up."""
    decode: dict[str, list[float]] = defaultdict(list)
    prefill: dict[int, dict[str, list[float]]] = {n: defaultdict(list) for n in PROMPTS}
    prompts = {length: [2, *range(1000, 1000 + length - 1)] for length in PROMPTS}
    for contestant in made.values():
        seconds_per_token(contestant, count)
        for prompt in prompts.values():
            contestant.prefill(prompt)
        settle()
    for _ in range(rounds):
        for name, contestant in made.items():
            settle()
            decode[name].append(1 / seconds_per_token(contestant, count))
            for length, prompt in prompts.items():
                settle()
                seconds = seconds_of(partial(contestant.prefill, prompt))
                prefill[length][name].append(length / seconds)
    return [
        Quantity("decode, tokens/s", decode, True),
        *(Quantity(f"prefill of {n}, tokens/s", prefill[n], True) for n in PROMPTS),
    ]


def starts(rounds: int) -> tuple[list[Quantity], list[str]]:
    """Fresh processes: ours with empty caches once, then everybody, in interleaved rounds.

    Prints where the time of ours went, and which of the others do not run on this machine.

    Returns:
      The quantities, and the names of those that run.
    """
    load: dict[str, list[float]] = defaultdict(list)
    first: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        # Both of ours start alike.
        starting = (name for name in NAMES if installed(name) and name != OURS_INT8)
        folders = {name: Path(scratch, name) for name in starting}
        model, tokenizer = gnb.load("gemma3-270m", progress=False)
        for name, folder in folders.items():
            folder.mkdir()
            if name != OURS:
                startup.prepare(name, model, tokenizer, folder)
        cold = startup.measure(OURS, folders[OURS])
        print(_phases("empty caches", cold))
        for _ in range(rounds):
            for name, folder in list(folders.items()):
                try:
                    marks = startup.measure(name, folder)
                except subprocess.CalledProcessError as error:
                    if name == OURS:
                        raise
                    print(f"{name} does not run here, and is left out: {error}")
                    del folders[name]
                    continue
                if name == OURS:
                    print(_phases("caches filled", marks))
                load[name].append(marks["loaded"])
                first[name].append(marks["first token"])
    quantities = [
        Quantity("import and load, s", load, False),
        Quantity("first token, second start, s", first, False),
        Quantity("first token, empty caches, s", {OURS: [cold["first token"]]}, False),
    ]
    return quantities, [OURS, OURS_INT8, *(name for name in folders if name != OURS)]


def _phases(title: str, marks: Mapping[str, float]) -> str:
    steps = ", ".join(f"{mark} {marks[mark]:.1f}" for mark in startup.MARKS)
    return f"gemma_nb, {title}: seconds from the start of the process: {steps}"


def floor() -> str:
    """What memory bandwidth allows, beside what each contestant's weights weigh."""
    from gemma_nb.checkpoints import catalog

    parts, _ = catalog.PACKAGES["gemma3-270m"].locate()
    weights = gnb.presets.by_name("gemma3-270m").num_params()
    sizes = {"bf16": 2 * weights, "f32": 4 * weights, LLAMA: sum(p.stat().st_size for p in parts)}
    bandwidth = read_bandwidth()
    most = ", ".join(f"{name} {bandwidth / size:.1f}" for name, size in sizes.items())
    return (
        f"memory is read at {bandwidth / 1e9:.1f} GB/s; reading all weights once per token allows "
        f"at most (tokens/s): {most}"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run at all")
    quick = parser.parse_args().quick
    where = conditions()
    print(where)
    # Start-up first: afterwards the other contestants' memory would crowd the page cache.
    started, names = starts(rounds=1 if quick else 3)
    measured = rates(contestants(names), rounds=2 if quick else 9, count=8 if quick else 48)
    allowed = floor()
    print(allowed)
    print(table([*measured, *started]))
    if not quick:
        keep(
            {
                "conditions": where,
                "floor": allowed,
                "quantities": record([*measured, *started]),
            }
        )


if __name__ == "__main__":
    main()
