"""Records what the reference computes: `python -m tests.parity.record`.

Needs torch and transformers in the versions of constraints.txt, 8 GB of memory and about two
minutes.  Record again only when a case, the text or `measure.sketch` changes; never to make a test
pass.
"""

from __future__ import annotations

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


def main() -> None:
    """Records every case."""
    cases: dict[str, Recorded] = {}
    for name, case in RANDOM.items():
        print(name)
        params = case.params()
        recorded = record(params, case.config, case.tokens())
        mark = recording.fingerprint(params)
        cases[name] = Recorded(recorded.tokens, recorded.sketch, recorded.noise, mark)
    print(REAL)
    model, tokenizer = gnb.load(REAL, dtype="float32")
    tokens = np.array(tokenizer.encode(text(), bos=True), np.int32)
    cases[REAL] = record(model.params, model.config, tokens)
    libraries = ("torch", "transformers", "numpy")
    recording.save(cases, {name: version(name) for name in libraries})
    print(f"{recording.PATH.name}: {recording.PATH.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
