"""google-deepmind's `gm` as a contestant: `python -m tests.bench.gm` where it is installed.

gm wants versions of Python and of libraries of its own: those of `make contract`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.reply import Reply, seconds_of
from tests.bench.worker import serve


class Samplers:
    """`gm.text.Sampler` with gm's own module in bfloat16, greedily."""

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

    def reply(self, prompt: str, count: int, stream: bool = False) -> Reply:
        """Makes `count` tokens after the prompt, from nothing.

        In one go nobody sees the first token come: a call for that token alone tells what it takes.
        """

        def sample(tokens: int, stream: bool) -> Any:
            return self._sampler.sample(prompt, max_new_tokens=tokens, stream=stream)

        if stream:
            return Reply.watched(sample(count, True), count)
        first = seconds_of(lambda: sample(1, False))
        whole = seconds_of(lambda: sample(count, False))
        return Reply(whole, (whole - first) / (count - 1))

    def prefill(self, ids: Sequence[int]) -> None:
        """Computes a prompt, up to the choice of the next token; its last token a second time."""
        text = self._tokenizer.decode(ids[1:])
        if self._tokenizer.encode(text, add_bos=True) != list(ids):
            raise RuntimeError("gm takes texts, and this prompt's text has other tokens")
        self._sampler.sample(text, max_new_tokens=1)


if __name__ == "__main__":
    serve(Samplers)
