"""The implementations that are timed, behind one interface."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax

import gemma_nb as gnb
from gemma_nb.sampling.ahead import COMPILING
from gemma_nb.sampling.decode import Decoder
from tests.bench.gm import Gm, Worker
from tests.bench.names import GM, GM_STREAM, HF_BF16, LLAMA, OURS, OURS_INT8, installed
from tests.bench.reply import Reply

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

    def reply(self, count: int) -> Reply:
        """Makes `count` tokens after PROMPT, from nothing."""
        ...

    def prefill(self, ids: Sequence[int]) -> None:
        """Computes a prompt from nothing, up to the choice of the next token."""
        ...


class Ours:
    """`ChatSession` as the chat panel uses it: text in, token events with their evidence out."""

    def __init__(self, model: GemmaTransformer, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat = gnb.ChatSession(model, tokenizer, template="none")
        self._decoder = Decoder(model, limit=4096, top_k=self._chat.capture.top_k)

    def reply(self, count: int) -> Reply:
        """As `Contestant` has it; what would end it early is forbidden."""
        ends = tuple(sorted(self._chat.template.stop_ids(self._tokenizer)))
        self._chat.new_conversation()
        self._chat.sampling = gnb.Sampling(temperature=0, max_new_tokens=count, forbidden=ends)
        return Reply.watched(self._chat.stream(PROMPT), count)

    def prefill(self, ids: Sequence[int]) -> None:
        """As `Contestant` has it."""
        self._decoder.reset()
        rest = self._decoder.begin(ids, gnb.Sampling(temperature=0, seed=0))
        self._decoder.prefill(rest)


def settle() -> None:
    """Waits for what a step compiles for later on another thread, and for threads that spin."""
    for thread in threading.enumerate():
        if thread.name == COMPILING:
            thread.join()
    time.sleep(0.1)


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

    def reply(self, count: int) -> Reply:
        """As `Contestant` has it."""
        clock = _Clock()
        start = time.perf_counter()
        self._model.generate(
            self._ids,
            attention_mask=self._torch.ones_like(self._ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            streamer=clock,
        )
        return Reply.of(start, clock.times[1:], count)  # the prompt comes first

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

    def reply(self, count: int) -> Reply:
        """As `Contestant` has it."""
        stream = self._llama.generate(self._ids, temp=0.0, reset=True)
        return Reply.watched(islice(stream, count), count)

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


def prompt_of(tokenizer: Tokenizer, length: int) -> list[int]:
    """The first tokens of a text, which is as long as it must be; <bos> is the first."""
    return tokenizer.encode(PROMPT * (1 + length // 40), bos=True)[:length]


@contextlib.contextmanager
def contestants(names: Sequence[str]) -> Iterator[dict[str, Contestant]]:
    """Those of `names` that can run here, loaded; prints a sentence about each that cannot."""
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    jax.block_until_ready(model.params)
    with contextlib.ExitStack() as stack:

        @functools.cache
        def worker() -> Worker:
            return stack.enter_context(contextlib.closing(Worker()))

        def make(name: str) -> Contestant:
            if name == OURS:
                return Ours(model, tokenizer)
            if name == OURS_INT8:
                return Ours(model.replace(storage="int8"), tokenizer)
            if name in (GM, GM_STREAM):
                return Gm(worker(), PROMPT, stream=name == GM_STREAM)
            if name == LLAMA:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                return LlamaCpp(joined_gguf(Path(folder)), tokenizer)
            return HuggingFace(model, tokenizer, name)

        made: dict[str, Contestant] = {}
        for name in filter(installed, names):
            try:
                made[name] = make(name)
            except Exception as error:
                if name in (OURS, OURS_INT8):
                    raise
                print(f"{name} does not run here, and is left out: {error}")
        yield made
