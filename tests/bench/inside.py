"""Looking inside beside TransformerLens, in one process on the same float32 weights.

    python -m tests.bench.inside

TransformerLens brings its own versions of torch and transformers, so this runs in an environment of
its own, which `.ci/inside.sh` makes.  Without TransformerLens ours are timed alone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gemma_nb as gnb
from tests.bench.names import OURS, TRANSFORMER_LENS, installed
from tests.bench.report import Quantity, conditions, keep, record, table

ROUNDS = 5
TASKS = {
    "cache": "attention and residuals of 512 tokens",
    "lens": "top-10 logit lens, 18 layers, 64 positions",
    "patching": "patching sweep, 18 layers, 20 positions",
}
TEXT = (
    "The lighthouse keeper's daughter had counted ships since she was four years old, and by the "
    "winter of the great storm she could tell a brig from a schooner by its lights alone. "
)
CLEAN = "The capital of France is Paris, of Italy Rome. The capital of Germany is the city called"
CORRUPTED = CLEAN.replace("Germany", "Poland")  # both are 20 tokens


def _resident() -> int:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * 4096


def _give_back() -> None:
    """Returns freed memory to the system: a run that took it again would seem to need none."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library that is not glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def measured(run: Callable[[], Any]) -> tuple[float, int]:
    """(seconds, bytes that the process grew by at most while it ran)."""
    gc.collect()
    _give_back()
    before, most, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, _resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    most = max(most, _resident() - before)
    done.set()
    watcher.join()
    del kept
    return seconds, most


class Ours:
    """`gemma_nb` as a user calls it."""

    def __init__(self, model: Any, ids: dict[str, list[int]]) -> None:
        self.model, self.ids = model, ids
        self.trace = gnb.trace(model, ids["text"][:64], sites=("residual", "final"))

    def cache(self) -> Any:
        """All attention and all residuals of 512 tokens."""
        trace = gnb.trace(self.model, self.ids["text"], sites=("attention", "residual"))
        return trace.attention.values, trace.residual.values

    def lens(self) -> Any:
        """The ten best tokens after 18 layers at 64 positions."""
        return gnb.logit_lens(self.trace, 10)

    def patching(self) -> Any:
        """Every layer and position of a 20-token prompt."""
        metric = gnb.LogitDifference(*self.ids["answers"])
        return gnb.activation_patching(
            self.model, self.ids["clean"], self.ids["corrupted"], metric, progress=False
        )


class TransformerLens:
    """TransformerLens's bridge around Hugging Face's model with our weights."""

    def __init__(self, model: Any, ids: dict[str, list[int]], folder: Path) -> None:
        import torch
        from transformer_lens.model_bridge import TransformerBridge

        from tests.parity import reference

        self.torch, self.ids = torch, ids
        theirs = reference.build(model.params, model.config, attention="eager")
        theirs.save_pretrained(folder)
        self.bridge = TransformerBridge.boot_transformers(
            str(folder), hf_model=theirs, dtype=torch.float32, device="cpu"
        )
        self.layers = model.config.num_layers
        with torch.inference_mode():
            _, self.short = self.bridge.run_with_cache(
                self._tokens("text")[:, :64], names_filter=self._names("hook_resid_post")
            )

    def _names(self, *ends: str) -> Any:
        wanted = {f"blocks.{i}.{end}" for i in range(self.layers) for end in ends}
        return lambda name: name in wanted

    def _tokens(self, name: str) -> Any:
        return self.torch.tensor([self.ids[name]])

    def cache(self) -> Any:
        """As `Ours` has it."""
        names = self._names("attn.hook_pattern", "hook_resid_post")
        with self.torch.inference_mode():
            return self.bridge.run_with_cache(self._tokens("text"), names_filter=names)[1]

    def lens(self) -> Any:
        """As `Ours` has it."""
        with self.torch.inference_mode():
            best = []
            for i in range(self.layers):
                x = self.short[f"blocks.{i}.hook_resid_post"]
                logits = self.bridge.unembed(self.bridge.ln_final(x))
                best.append(logits.log_softmax(-1).topk(10))
            return best

    def patching(self) -> Any:
        """As `Ours` has it, one run a cell; only as many cells as there are layers."""
        torch, (a, b) = self.torch, self.ids["answers"]
        with torch.inference_mode():
            _, cache = self.bridge.run_with_cache(
                self._tokens("clean"), names_filter=self._names("hook_resid_pre")
            )
            tokens = self._tokens("corrupted")
            found = []
            for cell in range(self.layers):
                layer, p = cell, cell % tokens.shape[1]
                name = f"blocks.{layer}.hook_resid_pre"

                def patch(x: Any, hook: Any, name: str = name, p: int = p) -> Any:
                    x[:, p] = cache[name][:, p]
                    return x

                logits = self.bridge.run_with_hooks(tokens, fwd_hooks=[(name, patch)])
                found.append(float(logits[0, -1, a] - logits[0, -1, b]))
            return np.array(found)


def compare(contestants: Mapping[str, Any], cells: int, *, quick: bool = False) -> list[Quantity]:
    """Seconds and added memory of each task, in interleaved rounds after one that warms up."""
    quantities = []
    for task, title in TASKS.items():
        seconds: dict[str, list[float]] = defaultdict(list)
        added: dict[str, list[float]] = defaultdict(list)
        for contestant in contestants.values():
            getattr(contestant, task)()
        for _ in range(1 if quick else ROUNDS):
            for name, contestant in contestants.items():
                took, grown = measured(getattr(contestant, task))
                # The bridge runs a cell for each layer; of the sweep this is one part in `cells`.
                times = cells if task == "patching" and name == TRANSFORMER_LENS else 1
                seconds[name].append(took * times)
                added[name].append(grown / 2**20)
        quantities += [Quantity(f"{title}, s", seconds, False)]
        if task == "cache":
            quantities += [Quantity(f"{title}, MB added", added, False)]
    return quantities


def main() -> None:
    """Measures, prints the table, and keeps the results beside the others'."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.inside", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round: does it run at all")
    quick = parser.parse_args().quick
    model, tokenizer = gnb.load("gemma3-270m", dtype="float32", progress=False)
    jax.block_until_ready(model.params)
    clean, corrupted = (tokenizer.encode(text, bos=True) for text in (CLEAN, CORRUPTED))
    if len(clean) != len(corrupted):
        raise RuntimeError(f"the prompts have {len(clean)} and {len(corrupted)} tokens")
    ids = {
        "text": (tokenizer.encode(TEXT * 20, bos=True))[:512],
        "clean": clean,
        "corrupted": corrupted,
        "answers": [tokenizer.encode(f" {word}")[0] for word in ("Berlin", "Warsaw")],
    }
    contestants: dict[str, Any] = {OURS: Ours(model, ids)}
    with tempfile.TemporaryDirectory() as folder:
        if installed(TRANSFORMER_LENS):
            contestants[TRANSFORMER_LENS] = TransformerLens(model, ids, Path(folder))
        where = conditions()
        print(where)
        quantities = compare(contestants, len(clean), quick=quick)
    print(table(quantities, (OURS, TRANSFORMER_LENS)))
    if not quick and TRANSFORMER_LENS in contestants:
        keep({"inside": {"conditions": where, "quantities": record(quantities)}})


if __name__ == "__main__":
    main()
