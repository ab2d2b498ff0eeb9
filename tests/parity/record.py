"""Records what the reference computes: `python -m tests.parity.record [CASE ...]`.

Without names, all cases are recorded; with names, these only, and the rest is kept.

Needs torch and transformers in the versions of constraints.txt, 8 GB of memory and about two
minutes.  Record again only when a case, the text or `measure.sketch` changes; never to make a test
pass.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

import gemma_nb as gnb
from gemma_nb.config import TransformerConfig
from tests.parity import recording, reference
from tests.parity.cases import RANDOM, REAL, text
from tests.parity.measure import attention_error, compare, logits_error, sketch
from tests.parity.recording import Recorded


def record(params: Any, config: TransformerConfig, tokens: np.ndarray) -> Recorded:
    """Runs the reference in float32 and float64 on one text."""
    model = reference.build(params, config)
    single = reference.run(model, tokens)
    double = reference.run(model.double(), tokens)
    kept = sketch(double)
    noise = compare(sketch(single, kept["top_ids"]), kept)
    noise["attention_whole"], _ = attention_error(single.attention, double.attention)
    whole, anywhere = logits_error(single.logits, double.logits)
    print(
        f"    float32 against float64: logits {whole:.2e} over the whole, {anywhere:.2e} at worst"
    )
    print(f"    (estimated {noise['logits_whole']:.2e}, {noise['logits_anywhere']:.2e}),")
    print(f"    attention at most {noise['attention_whole'].max():.2e}")
    return Recorded(tokens, kept, noise)


def record_case(name: str) -> Recorded:
    """Records one case by name."""
    if name == REAL:
        model, tokenizer = gnb.load(REAL, dtype="float32")
        tokens = np.array(tokenizer.encode(text(), bos=True), np.int32)
        return record(model.params, model.config, tokens)
    params = RANDOM[name].params()
    recorded = record(params, RANDOM[name].config, RANDOM[name].tokens())
    return dataclasses.replace(recorded, fingerprint=recording.fingerprint(params))


def main(names: Sequence[str]) -> None:
    """Records the cases `names`, or all where there are none."""
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
    if names and versions != recording.versions():
        raise SystemExit(f"the other cases were recorded with {recording.versions()}: record all")
    cases: dict[str, Recorded] = {}
    for name in (*RANDOM, REAL):
        if names and name not in names:
            cases[name] = recording.load(name)
        else:
            print(name)
            cases[name] = record_case(name)
    recording.save(cases, versions)
    print(f"{recording.PATH.name}: {recording.PATH.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
