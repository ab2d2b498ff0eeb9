"""One of two processes that share a model, each with four of its eight simulated devices.

Run by test_placement.py as two processes, as `jax.distributed` runs on two hosts.
Prints what it computed as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np


def main(process: int, port: int, folder: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    import gemma_nb as gnb
    from tests.on_eight_devices import decoder, logits, random_model

    model = random_model(8).place("auto")
    loaded, _ = gnb.load(folder / "hf", dtype="float32", mesh="auto", progress=False)
    _, reply = decoder(model)
    table = model.params["embedder"]["input_embedding"]
    result = {
        "devices": [jax.device_count(), jax.local_device_count()],
        "reply": reply,
        "logits": float(np.abs(logits(model)).sum()),
        "loaded": float(np.abs(logits(loaded)).sum()),
        "rows here": sum(shard.data.shape[0] for shard in table.addressable_shards),
        "rows": table.shape[0],
    }
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
