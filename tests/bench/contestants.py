"""The implementations that are timed, behind one interface."""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax

import gemma_nb as gnb
from gemma_nb.sampling.compile_ahead import COMPILING
from gemma_nb.sampling.decode import Decoder
from tests.bench.names import GM, GM_STREAM, LLAMA, OURS, OURS_INT8, gm_python, installed
from tests.bench.reply import Reply
from tests.bench.rivals import joined_gguf
from tests.bench.worker import Worker, bounded

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
        with bounded():
            return self._reply(count)

    def prefill(self, ids: Sequence[int]) -> None:
        """As `Contestant` has it."""
        with bounded():
            self._decoder.reset()
            rest = self._decoder.begin(ids, gnb.Sampling(temperature=0, seed=0))
            self._decoder.prefill(rest)

    def _reply(self, count: int) -> Reply:
        ends = tuple(sorted(self._chat.template.stop_ids(self._tokenizer)))
        self._chat.new_conversation()
        self._chat.sampling = gnb.Sampling(temperature=0, max_new_tokens=count, forbidden=ends)
        return Reply.watched(self._chat.stream(PROMPT), count)


class Rival:
    """Another library, in the process of `worker`."""

    def __init__(self, worker: Worker, *options: Any) -> None:
        self._worker, self._options = worker, options

    def reply(self, count: int) -> Reply:
        """As `Contestant` has it."""
        return Reply(*self._worker.ask("reply", PROMPT, count, *self._options))

    def prefill(self, ids: Sequence[int]) -> None:
        """As `Contestant` has it."""
        self._worker.ask("prefill", list(ids))


def settle() -> None:
    """Waits for what a step compiles for later on another thread, and for threads that spin."""
    for thread in threading.enumerate():
        if thread.name == COMPILING:
            thread.join()
    time.sleep(0.1)


def prompt_of(tokenizer: Tokenizer, length: int) -> list[int]:
    """The first tokens of a text, which is as long as it must be; <bos> is the first."""
    return tokenizer.encode(PROMPT * (1 + length // 40), bos=True)[:length]


@contextlib.contextmanager
def contestants(names: Sequence[str]) -> Iterator[dict[str, Contestant]]:
    """Those of `names` that can run here, loaded; prints a sentence about each that cannot."""
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    jax.block_until_ready(model.params)
    with contextlib.ExitStack() as stack:

        def worker(name: str, *command: str) -> Worker:
            return stack.enter_context(contextlib.closing(Worker(name, command)))

        @functools.cache
        def gm() -> Worker:  # one for both of its ways
            return worker(GM, str(gm_python()), "-m", "tests.bench.gm")

        def make(name: str) -> Contestant:
            if name == OURS:
                return Ours(model, tokenizer)
            if name == OURS_INT8:
                return Ours(model.replace(storage="int8"), tokenizer)
            if name in (GM, GM_STREAM):
                return Rival(gm(), name == GM_STREAM)
            command = [sys.executable, "-m", "tests.bench.rivals", name]
            if name == LLAMA:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                command.append(str(joined_gguf(Path(folder))))
            return Rival(worker(name, *command))

        made: dict[str, Contestant] = {}
        for name in filter(installed, names):
            try:
                made[name] = make(name)
            except Exception as error:
                if name in (OURS, OURS_INT8):
                    raise
                print(f"{name} does not run here, and is left out: {error}")
        yield made
