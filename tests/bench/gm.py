"""google-deepmind's `gm` as a contestant, in a process of its own.

gm wants versions of Python and of libraries of its own, so it runs in the environment of `make
contract`.  Its process computes when it is asked to, a line of JSON for a line of JSON, and sleeps
otherwise: the rounds of the benchmark stay interleaved.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.names import gm_python
from tests.bench.reply import Reply, seconds_of

REPO = Path(__file__).parents[2]


class Worker:
    """The process in which gm runs."""

    def __init__(self) -> None:
        """Starts it and waits until the weights are loaded.

        Raises:
          RuntimeError: it ended; with the last line of what it said.
        """
        with contextlib.ExitStack() as stack:
            self._said = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            self._process = subprocess.Popen(
                [str(gm_python()), "-m", "tests.bench.gm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                cwd=REPO,
            )
            self._answer()
            self._closing = stack.pop_all()

    def ask(self, name: str, *args: Any) -> Any:
        """What the method `name` of `_Samplers` returns in that process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` says why
            self._process.stdin.write(json.dumps([name, *args]) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        with self._closing:
            self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._said.seek(0)
        last = [line.strip() for line in self._said if line.strip()][-1:]
        raise RuntimeError(f"gm's process ended with {code}: {' '.join(last)}")


class Gm:
    """`gm.text.Sampler` with gm's own module in bfloat16, greedily."""

    def __init__(self, worker: Worker, prompt: str, *, stream: bool) -> None:
        self._worker, self._prompt, self._stream = worker, prompt, stream

    def reply(self, count: int) -> Reply:
        """As `Contestant` has it."""
        return Reply(*self._worker.ask("reply", self._prompt, count, self._stream))

    def prefill(self, ids: Sequence[int]) -> None:
        """As `Contestant` has it; gm computes the prompt's last token a second time."""
        self._worker.ask("prefill", list(ids))


class _Samplers:
    """What runs in gm's process."""

    def __init__(self) -> None:
        import jax.numpy as jnp

        import gemma_nb as gnb
        from tests.contract import theirs

        model, tokenizer = gnb.load("gemma3-270m", progress=False)
        gm = theirs.gm()
        module = gm.nn.Transformer(
            config=theirs.config(model.config), tokens="tokens", dtype=jnp.bfloat16
        )
        self._folder = tempfile.TemporaryDirectory()  # gm reads the vocabulary when it needs it
        self._tokenizer = theirs.tokenizer(tokenizer, Path(self._folder.name))
        ends = self._tokenizer.special_tokens
        names = ("EOS", "END_OF_TURN", "BEGIN_OF_TOOL_RESPONSE")
        self._sampler = gm.text.Sampler(
            model=module,
            params=model.params,
            tokenizer=self._tokenizer,
            cache_length=1024,  # as much as llama.cpp is given
            max_out_length=256,
            pad_length=None,  # no token of padding is computed
            forbidden_tokens=tuple(int(getattr(ends, name)) for name in names),
        )

    def reply(self, prompt: str, count: int, stream: bool) -> list[float]:
        """The fields of a `Reply`.

        In one go nobody sees the first token come: a call for that token alone tells what it takes.
        """

        def sample(tokens: int, stream: bool) -> Any:
            return self._sampler.sample(prompt, max_new_tokens=tokens, stream=stream)

        if stream:
            return list(Reply.watched(sample(count, True), count))
        first = seconds_of(lambda: sample(1, False))
        whole = seconds_of(lambda: sample(count, False))
        return list(Reply(whole, (whole - first) / (count - 1)))

    def prefill(self, ids: Sequence[int]) -> None:
        """Computes a prompt of these tokens, up to the choice of the next one."""
        text = self._tokenizer.decode(ids[1:])
        if self._tokenizer.encode(text, add_bos=True) != list(ids):
            raise RuntimeError("gm takes texts, and this prompt's text has other tokens")
        self._sampler.sample(text, max_new_tokens=1)


def main() -> None:
    """Answers until nobody asks any more."""
    # What libraries print belongs to stderr; the first stdout is for answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    samplers = _Samplers()

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    say("ready")
    for line in sys.stdin:
        name, *args = json.loads(line)
        say(getattr(samplers, name)(*args))


if __name__ == "__main__":
    main()
