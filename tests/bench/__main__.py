"""`python -m tests.bench [--quick]`: measures and prints the table."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import gemma_nb as gnb
from tests.bench import startup
from tests.bench.contestants import PROMPT, Contestant, contestants, prompt_of, settle
from tests.bench.floor import described, distances, read_bandwidth, sizes
from tests.bench.names import GM, GM_STREAM, NAMES, OURS, OURS_INT8, installed
from tests.bench.reply import seconds_of
from tests.bench.report import DECODE, Quantity, conditions, keep, prefill_of, record, table

PROMPTS = (64, 256)  # tokens
# Both of ours start alike, and gm stays as it is loaded.
STARTING = tuple(name for name in NAMES if name not in (OURS_INT8, GM, GM_STREAM))


def warm_up(
    made: Mapping[str, Contestant], prompts: Sequence[Sequence[int]], count: int
) -> dict[str, Contestant]:
    """Those of `made` that run; prints a sentence about each that does not."""
    warm = {}
    for name, contestant in made.items():
        start = time.perf_counter()
        try:
            contestant.reply(_tokens_of(name, count))
            for prompt in prompts:
                contestant.prefill(prompt)
        except Exception as error:
            if name in (OURS, OURS_INT8):
                raise
            print(f"{name} does not run here, and is left out: {error}")
        else:
            warm[name] = contestant
            print(f"{name} is warm: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        settle()
    return warm


def _tokens_of(name: str, count: int) -> int:
    """How many tokens a contestant makes, of `count` that make a reply.

    gm takes a third of a second for each that it streams: a whole reply in each round would be half
    of the benchmark.
    """
    return max(2, count // 4) if name == GM_STREAM else count


def rates(made: Mapping[str, Contestant], rounds: int, count: int) -> list[Quantity]:
    """Decoding and prefill, in interleaved rounds after one that warms up."""
    _, tokenizer = gnb.load("gemma3-270m", progress=False)
    prompts = {length: prompt_of(tokenizer, length) for length in PROMPTS}
    decode: dict[str, list[float]] = defaultdict(list)
    whole: dict[str, list[float]] = defaultdict(list)
    prefill: dict[int, dict[str, list[float]]] = {n: defaultdict(list) for n in PROMPTS}
    made = warm_up(made, list(prompts.values()), count)

    def measure(name: str, contestant: Contestant) -> None:
        settle()
        reply = contestant.reply(_tokens_of(name, count))
        decode[name].append(1 / reply.per_token)
        if name == GM_STREAM:
            return  # gm reads a prompt in one way, however it answers
        whole[name].append(reply.whole)
        for length, prompt in prompts.items():
            settle()
            seconds = seconds_of(partial(contestant.prefill, prompt))
            prefill[length][name].append(length / seconds)

    for done in range(rounds):
        start = time.perf_counter()
        for name, contestant in list(made.items()):
            try:
                measure(name, contestant)
            except Exception as error:
                if name in (OURS, OURS_INT8):
                    raise
                print(f"{name} does not go on, and is left out: {error}")
                del made[name]
                for values in (decode, whole, *prefill.values()):
                    values.pop(name, None)
        took = time.perf_counter() - start
        print(f"round {done + 1} of {rounds}: {took:.0f} s", file=sys.stderr)
    asked = len(tokenizer.encode(PROMPT, bos=True))
    return [
        Quantity(DECODE, decode, True),
        *(Quantity(prefill_of(n), prefill[n], True) for n in PROMPTS),
        Quantity(f"{count} tokens after a prompt of {asked}, s", whole, False),
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
        starting = (name for name in STARTING if installed(name))
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
                except subprocess.SubprocessError as error:
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
    lost = set(STARTING) - set(folders)
    return quantities, [name for name in NAMES if name not in lost]


def _phases(title: str, marks: Mapping[str, float]) -> str:
    steps = ", ".join(f"{mark} {marks[mark]:.1f}" for mark in startup.MARKS)
    return f"gemma_nb, {title}: seconds from the start of the process: {steps}"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run at all")
    quick = parser.parse_args().quick
    where = conditions()
    print(where)
    # Start-up first: afterwards the other contestants' memory would crowd the page cache.
    started, names = starts(rounds=1 if quick else 3)
    bandwidth = read_bandwidth()
    with contestants(names) as made:
        measured = rates(made, rounds=2 if quick else 7, count=8 if quick else 48)
    bandwidth = max(bandwidth, read_bandwidth())
    far = distances(bandwidth, sizes(), measured[0].medians())
    print(described(bandwidth, far))
    print(table([*measured, *started]))
    if not quick:
        keep(
            {
                "conditions": where,
                "floor": {
                    "bytes per second": bandwidth,
                    **{name: {**asdict(d), "times": d.times} for name, d in far.items()},
                },
                "quantities": record([*measured, *started]),
            }
        )


if __name__ == "__main__":
    main()
