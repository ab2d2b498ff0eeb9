"""A chat session without a model: it streams scripted tokens with evidence, slowly if asked.

It keeps the interface of `gemma_nb.chat.session.ChatSession` that the panels use, so that they can
be tested, and driven in a browser, without weights.
"""

from __future__ import annotations

import math
import random
import threading
import time
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import xarray as xr

from gemma_nb.chat.events import PrefillEvent, TokenEvent
from gemma_nb.chat.records import Alternative, TokenRecord
from gemma_nb.chat.tokens import GrowingTokens
from gemma_nb.chat.turns import Timing, Turn
from gemma_nb.errors import BusyError
from gemma_nb.sampling.settings import Sampling

WORDS = (
    *(" The", " capital", " city", " it", " of", " a", " Paris", " Rome", " that", " known"),
    *(" is", " was", " and", ",", ".", " in", "\n", " France"),
)
REPLIES = (
    (" The", " capital", " of", " France", " is", " Paris", ".", "<end_of_turn>"),
    (" The", " most", " famous", " building", " is", " the", " Eiffel", " Tower", ".", "\n\n"),
)


def evidence(piece: str, index: int, position: int, seed: int, top_k: int = 10) -> dict[str, Any]:
    """The fields of a `TokenRecord`: probabilities that fall off, the same for the same seed."""
    rng = random.Random(f"{piece}/{index}/{seed}")
    steepness = rng.uniform(0.3, 2.5)
    raw = [math.exp(-steepness * i - rng.uniform(0, 0.4)) for i in range(top_k)]
    left = rng.uniform(0.02, 0.3)
    before = [value / sum(raw) * (1 - left) for value in sorted(raw, reverse=True)]
    after = [value**1.6 for value in before]
    after = [value / sum(after) for value in after]
    others = [word for word in WORDS if word != piece]
    rng.shuffle(others)
    rank = 0 if rng.random() < 0.75 else rng.randrange(1, top_k + 2)
    texts = others[:top_k]
    inside = rank < top_k
    if inside:
        texts[rank] = piece
    alternatives = tuple(
        Alternative(zlib.crc32(text.encode()) % 200_000, text, math.log(p), q)
        for text, p, q in zip(texts, before, after, strict=True)
    )
    chosen = before[rank] if inside else before[-1] / 2
    special = piece.startswith("<") or piece == "\n\n"
    return {
        "index": index,
        "token_id": zlib.crc32(piece.encode()) % 200_000,
        "text": "" if special else piece,
        "piece": piece,
        "position": position,
        "logprob": math.log(chosen),
        "probability": after[rank] if inside else 0.0,
        "entropy": -sum(p * math.log(p) for p in before) + left * 3,
        "rank": rank,
        "alternatives": alternatives,
    }


class FakeTrace:
    """Attention with a sink at position 0, a local band and a few far looks."""

    def __init__(self, labels: list[str], config: Any, layers: list[int] | None, seed: int) -> None:
        self.labels = labels
        self.tokens = np.arange(len(labels))
        chosen = list(range(len(config.layers))) if layers is None else layers
        rng = np.random.default_rng(seed)
        length = len(labels)
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]
        shape = (len(chosen), config.num_heads, length, length)
        scores = rng.gumbel(size=shape).astype(np.float32) - 0.06 * distance
        scores[..., 0] += 3.0
        for at, layer in enumerate(chosen):
            window = getattr(config.layers[layer].kind, "window", None)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            scores[at][:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        kinds = [config.layers[layer].kind.label for layer in chosen]
        self.attention = xr.DataArray(
            weights.astype(np.float32),
            dims=("layer", "head", "query", "key"),
            coords={"layer": chosen, "layer_kind": ("layer", kinds)},
        )


class FakeSession:
    """Streams `replies` one after another, a token every `delay` seconds.

    Args:
      config: a `TransformerConfig`, for the attention panel.
      replies: scripts, each a sequence of pieces; used in turn.
      prefill: seconds of reading a prompt, which is done in two pieces.
      fail_at: index of the reply token before which the stream raises.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        replies: Any = REPLIES,
        delay: float = 0.0,
        prefill: float = 0.0,
        fail_at: int | None = None,
        cache_length: int = 4096,
    ) -> None:
        info = SimpleNamespace(name="fake", title="Gemma 3 270M", tuning="base")
        self.model = SimpleNamespace(config=config, info=info)
        self.tokenizer = None
        self.template = SimpleNamespace(name="transcript")
        self.sampling = Sampling(temperature=0.6, top_k=40, seed=1)
        self.system = None
        self.turns: tuple[Turn, ...] = ()
        self.partial: Turn | None = None
        self.cache_length = cache_length
        self.replies, self.delay, self.prefill, self.fail_at = replies, delay, prefill, fail_at
        self.traced: list[tuple[int, Any]] = []
        self._labels = ["<bos>", "A", " user", " talks", " with", " an", " assistant", ".", "\n\n"]
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.listeners: list[Any] = []
        self._next_id = 1
        self._sent = 0

    @property
    def busy(self) -> bool:
        return self._lock.locked()

    @property
    def cache_used(self) -> int:
        return len(self._labels)

    def stream(self, text: str) -> Any:
        self._labels += ["User", ":", *[" " + word for word in text.split()], "\n"]
        return self._generate(self.turns, text)

    def stream_regenerate(self) -> Any:
        return self._generate(self.turns[:-2], self.turns[-2].text)

    def chat(self, text: str) -> Turn:
        for _ in self.stream(text):
            pass
        return self.turns[-1]

    def on_prefill(self, listener: Any) -> Any:
        self.listeners.append(listener)
        return lambda: listener in self.listeners and self.listeners.remove(listener)

    def siblings(self, turn: Turn) -> tuple[Turn, ...]:
        return (turn,)

    def stop(self) -> None:
        self._stop.set()

    def new_conversation(self) -> None:
        self.turns, self._labels = (), self._labels[:9]

    def warmup(self, progress: Any = None) -> None:
        for step in range(1, 5):
            time.sleep(self.prefill)
            if progress:
                progress(step / 4, f"Compiling step {step} of 4")

    def trace(self, turn: Any = None, *, sites: Any = (), layers: Any = None) -> FakeTrace:
        turn = turn or self.turns[-1]
        self.traced.append((turn.id, layers))
        labels = self._labels[: turn.tokens[-1].position + 1]
        return FakeTrace(labels, self.model.config, layers, turn.id)

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _generate(self, before: tuple[Turn, ...], text: str) -> Any:
        if not self._lock.acquire(blocking=False):
            raise BusyError("the session is generating")
        try:
            self._stop.clear()
            self.turns = (*before, Turn(self._new_id(), "user", text))
            self._labels += ["Assistant", ":"]
            yield from self._tokens(self.replies[self._sent % len(self.replies)])
        finally:
            self._sent += 1
            self._lock.release()

    def _tokens(self, script: Any) -> Any:
        records = GrowingTokens()
        reason, detail = "stop", ""
        turn_id = self._new_id()
        self.partial = Turn(turn_id, "model", "")
        began = time.monotonic()
        for done in (1500, 3000):
            time.sleep(self.prefill / 2)
            for listener in self.listeners:
                listener(PrefillEvent(done, 3000))
        try:
            for index, piece in enumerate(script):
                if self.fail_at == index:
                    reason, detail = "error", "Ended by an error: the logits are not finite."
                    raise FloatingPointError(f"NaN logits at position {len(self._labels)}")
                if self._stop.is_set():
                    reason, detail = "cancelled", "Stopped before the reply was complete."
                    break
                fields = evidence(piece, index, len(self._labels), self._sent)
                self._labels.append(piece)
                records.extend([TokenRecord(**fields)])
                self.partial = Turn(turn_id, "model", "", records.tokens)
                yield TokenEvent(**fields, cache_used=self.cache_used, finish_reason=None)
                if index + 1 >= self.sampling.max_new_tokens:
                    reason, detail = "length", "Reached the limit of new tokens."
                    break
                time.sleep(self.delay)
        finally:
            timing = Timing(
                len(self._labels), self.prefill, len(records.tokens), time.monotonic() - began
            )
            said = "".join(records.tokens.text.tolist()).lstrip()
            self.partial = None
            self.turns = (
                *self.turns,
                Turn(
                    turn_id,
                    "model",
                    said,
                    records.tokens,
                    finish_reason=reason,
                    finish_detail=detail,
                    timing=timing,
                ),
            )
