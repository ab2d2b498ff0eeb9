"""The implementations that are timed, behind one interface."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax

import gemma_nb as gnb
from gemma_nb.sampling.decode import COMPILING, Decoder
from tests.bench.names import HF_BF16, LLAMA, OURS, OURS_INT8, installed

if TYPE_CHECKING:
    from gemma_nb.model import GemmaTransformer
    from gemma_nb.text.tokenizer import Tokenizer

PROMPT = (
    "The lighthouse at the end of the harbour had been dark for eleven winters when Mara came back "
    "to the island. She had left with two suitcases and a promise to write, and she returned with "
    "one suitcase and no excuse. The ferry was late, as it had always been late;"
)


class Contestant(Protocol):
    """Something that decodes and prefills with the default model's weights, greedily."""

    def token_times(self, count: int) -> list[float]:
        """Decodes `count` tokens after PROMPT: the time at which each was there."""
        ...

    def prefill(self, ids: Sequence[int]) -> None:
        """Computes a prompt from nothing, up to the choice of the next token."""
        ...


def seconds_per_token(contestant: Contestant, count: int) -> float:
    """Of the `count` tokens after the first one, which prefill makes."""
    times = contestant.token_times(count + 1)
    if len(times) != count + 1:
        raise RuntimeError(f"asked for {count + 1} tokens, got {len(times)}")
    return (times[-1] - times[0]) / count


def seconds_of(run: Callable[[], Any]) -> float:
    """How long `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Ours:
    """`ChatSession` as the chat panel uses it: text in, token events with their evidence out."""

    def __init__(self, model: GemmaTransformer, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat = gnb.ChatSession(model, tokenizer, template="none")
        self._decoder = Decoder(model, limit=4096, top_k=self._chat.capture.top_k)

    def token_times(self, count: int) -> list[float]:
        """As `Contestant` has it; what would end the reply early is forbidden."""
        ends = tuple(sorted(self._chat.template.stop_ids(self._tokenizer)))
        self._chat.new_conversation()
        self._chat.sampling = gnb.Sampling(temperature=0, max_new_tokens=count, forbidden=ends)
        return [time.perf_counter() for _ in self._chat.stream(PROMPT)]

    def prefill(self, ids: Sequence[int]) -> None:
        """As `Contestant` has it."""
        self._decoder.reset()
        rest = self._decoder.begin(ids, gnb.Sampling(temperature=0, seed=0))
        self._decoder.prefill(rest)


def settle() -> None:
    """Waits for what a step compiles for later on another thread."""
    for thread in threading.enumerate():
        if thread.name == COMPILING:
            thread.join()


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

    def __init__(self, model: GemmaTransformer, tokenizer: Tokenizer, name: str) -> None:
        import torch

        self._torch = torch
        self._model = hugging_face(model, name)
        self._ids = torch.tensor([tokenizer.encode(PROMPT, bos=True)])

    def token_times(self, count: int) -> list[float]:
        """As `Contestant` has it."""
        clock = _Clock()
        self._model.generate(
            self._ids,
            attention_mask=self._torch.ones_like(self._ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            streamer=clock,
        )
        return clock.times[1:]  # the prompt comes first

    def prefill(self, ids: Sequence[int]) -> None:
        """As `Contestant` has it."""
        with self._torch.inference_mode():
            given = self._torch.tensor([list(ids)])
            int(self._model(given, use_cache=True, logits_to_keep=1).logits.argmax())


class LlamaCpp:
    """llama.cpp on the GGUF file that our weights came from."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        import llama_cpp

        threads = os.cpu_count()
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._ids = tokenizer.encode(PROMPT, bos=True)

    def token_times(self, count: int) -> list[float]:
        """As `Contestant` has it."""
        stream = self._llama.generate(self._ids, temp=0.0, reset=True)
        return [time.perf_counter() for _ in zip(range(count), stream, strict=False)]

    def prefill(self, ids: Sequence[int]) -> None:
        """As `Contestant` has it."""
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


def contestants(names: Sequence[str]) -> dict[str, Contestant]:
    """Those of `names` that can run here, loaded and warm."""
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    jax.block_until_ready(model.params)
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Contestant] = {}
        for name in filter(installed, names):
            if name == OURS:
                made[name] = Ours(model, tokenizer)
            elif name == OURS_INT8:
                made[name] = Ours(model.replace(storage="int8"), tokenizer)
            elif name == LLAMA:
                # The file is mapped into memory: on POSIX it may be unlinked while in use.
                made[name] = LlamaCpp(joined_gguf(Path(folder)), tokenizer)
            else:
                made[name] = HuggingFace(model, tokenizer, name)
    return made
