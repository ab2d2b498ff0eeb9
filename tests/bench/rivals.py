"""Other libraries as contestants: `python -m tests.bench.rivals NAME [GGUF]` answers for one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gemma_nb as gnb
from tests.bench.names import HF_BF16, LLAMA
from tests.bench.reply import Reply
from tests.bench.worker import serve

if TYPE_CHECKING:
    from gemma_nb.model import GemmaTransformer


def hugging_face(model: GemmaTransformer, name: str) -> Any:
    """`Gemma3ForCausalLM` with our weights, in the dtype that `name` tells."""
    import torch

    from tests.parity import reference

    theirs = reference.build(model.params, model.config, attention="sdpa")
    return theirs.to(torch.bfloat16 if name == HF_BF16 else torch.float32)


class _Clock:
    """A streamer for `generate` that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


class HuggingFace:
    """transformers' `generate` with its key-value cache and its fastest attention for CPUs."""

    def __init__(self, name: str) -> None:
        import torch

        model, self._tokenizer = gnb.load("gemma3-270m", progress=False)
        self._torch = torch
        self._model = hugging_face(model, name)

    def reply(self, prompt: str, count: int) -> Reply:
        """Makes `count` tokens after the prompt, from nothing."""
        ids = self._torch.tensor([self._tokenizer.encode(prompt, bos=True)])
        clock = _Clock()
        start = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            streamer=clock,
        )
        return Reply.of(start, clock.times[1:], count)  # the prompt comes first

    def prefill(self, ids: Sequence[int]) -> None:
        """Computes a prompt from nothing, up to the choice of the next token."""
        with self._torch.inference_mode():
            given = self._torch.tensor([list(ids)])
            int(self._model(given, use_cache=True, logits_to_keep=1).logits.argmax())


class LlamaCpp:
    """llama.cpp on the GGUF file that our weights came from."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        _, self._tokenizer = gnb.load("gemma3-270m", progress=False)
        threads = os.cpu_count()
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def reply(self, prompt: str, count: int) -> Reply:
        """Makes `count` tokens after the prompt, from nothing."""
        ids = self._tokenizer.encode(prompt, bos=True)
        stream = self._llama.generate(ids, temp=0.0, reset=True)
        return Reply.watched(islice(stream, count), count)

    def prefill(self, ids: Sequence[int]) -> None:
        """Computes a prompt from nothing, up to the choice of the next token."""
        self._llama.reset()
        next(self._llama.generate(list(ids), temp=0.0))


def joined_gguf(folder: Path) -> Path:
    """The default model's package joined into one GGUF file, which llama.cpp wants."""
    from gemma_nb.checkpoints import catalog

    parts, _ = catalog.PACKAGES["gemma3-270m"].locate()
    path = folder / "model.gguf"
    with path.open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
    return path


def main(name: str, *args: str) -> None:
    """Answers for one of them."""
    serve(partial(LlamaCpp, Path(args[0])) if name == LLAMA else partial(HuggingFace, name))


if __name__ == "__main__":
    main(*sys.argv[1:])
