"""The conversation as the front end sees it, and the deltas that keep it up to date.

A token is a dict with compact keys: `id`, `t` its text, `w` its label (the piece) where that is not
the text, `at` its absolute position, `lp` its natural log-probability before the sampler, `p` its
probability after it, `h` the entropy in nats, `r` its rank before the sampler (0 first) and `a` the
alternatives as `[id, text, lp, p]`.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Turn = dict[str, Any]


def number(value: float | None) -> float | None:
    """`value` with 6 significant digits; None when it is not finite (JSON has no infinity)."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def log_number(value: float) -> float | None:
    """A log-probability with 6 decimals, which is 6 significant digits of the probability."""
    return round(value, 6) if math.isfinite(value) else None


_OF_TOKEN = ("token_id", "text", "position", "logprob", "probability", "entropy", "rank", "piece")
_OF_ALTERNATIVE = ("token_id", "text", "logprob", "probability")


def encode_token(record: Any) -> dict[str, Any]:
    """A `TokenRecord` (or `TokenEvent`) with compact keys."""
    others = ([getattr(other, name) for name in _OF_ALTERNATIVE] for other in record.alternatives)
    return _encoded([getattr(record, name) for name in _OF_TOKEN], others)


def encode_tokens(tokens: Any) -> list[dict[str, Any]]:
    """Many tokens (`Turn.tokens`) with compact keys, from their columns."""
    columns = [getattr(tokens, name).tolist() for name in _OF_TOKEN]
    others = [getattr(tokens.alternatives, name).tolist() for name in _OF_ALTERNATIVE]
    counts = tokens.alternatives.count.tolist()
    return [
        _encoded(row, itertools.islice(zip(*of_alternatives, strict=True), count))
        for *row, count, of_alternatives in zip(
            *columns, counts, zip(*others, strict=True), strict=True
        )
    ]


def _encoded(values: Sequence[Any], others: Iterable[Iterable[Any]]) -> dict[str, Any]:
    """A token with compact keys, of values as in `_OF_TOKEN` and `_OF_ALTERNATIVE`."""
    token_id, text, position, logprob, probability, entropy, rank, piece = values
    token: dict[str, Any] = {
        "id": token_id,
        "t": text,
        "at": position,
        "lp": log_number(logprob),
        "p": number(probability),
        "h": number(entropy),
        "r": rank,
        "a": [[other, said, log_number(lp), number(p)] for other, said, lp, p in others],
    }
    if piece != text:
        token["w"] = piece
    return token


def encode_head(turn: Any) -> Turn:
    """A `Turn` without its tokens.  Only a turn that has no tokens needs its text."""
    head: Turn = {"id": turn.id, "role": turn.role}
    if not turn.tokens:
        head["text"] = turn.text
    if turn.finish_reason is not None:
        head["finish"] = turn.finish_reason
        head["detail"] = turn.finish_detail or ""
    timing = getattr(turn, "timing", None)
    if timing is not None and turn.role == "model":
        head["new"] = timing.new_tokens
        head["tps"] = number(timing.tokens_per_second)
    return head


def _tokens_in_common(have: Turn, turn: Any) -> int | None:
    """Number of the turn's tokens that `have` holds; None where it is not that turn's beginning."""
    ids = [token["id"] for token in have["tokens"]]
    if have["role"] != turn.role or ids != turn.tokens[: len(ids)].token_id.tolist():
        return None
    return len(ids) if turn.tokens or have.get("text", "") == turn.text else None


class TranscriptFeed:
    """Holds the turns, changed in place, and sends what changed as deltas.

    A delta is `{seq, length, at, turn, start, tokens}`: turn number `at` gets this head, its tokens
    from `start` on are these, and of all turns the first `length` stay.  `turn` None empties the
    transcript.

    Deltas leave at most every `interval` seconds: drawing one takes a browser as long as the model
    takes for a token, on the same processors.  While more than `window` of them are not
    acknowledged (the browser tells of every eighth) the feed holds back, up to `hold` seconds, and
    the tokens travel together.

    Not thread-safe: the panel calls it under its lock.

    Args:
      send: takes one delta.
      head: what a session's turn is without its tokens.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        send: Callable[[dict[str, Any]], None],
        *,
        head: Callable[[Any], Turn] = encode_head,
        interval: float = 0.1,
        window: int = 16,
        hold: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send, self._head = send, head
        self._interval, self._window, self._hold, self._clock = interval, window, hold, clock
        self.turns: list[Turn] = []
        self.seq = 0
        self._acknowledged = 0
        self._sent_at = -math.inf
        self._start: int | None = None  # first token of the last turn that was not sent yet

    def place(self, at: int, head: Turn, tokens: list[dict[str, Any]] | None = None) -> None:
        """Makes `head` turn number `at`, the last one, and sends it at once."""
        self.flush(force=True)
        self.turns[at:] = [{**head, "tokens": list(tokens or ())}]
        self._start = 0
        self.flush(force=True)

    def append(self, token: dict[str, Any]) -> None:
        """Adds a token to the last turn; it is sent now or with later ones."""
        tokens = self.turns[-1]["tokens"]
        if self._start is None:
            self._start = len(tokens)
        tokens.append(token)
        self.flush()

    def rehead(self, head: Turn, at: int = -1) -> None:
        """Replaces everything of turn number `at` but its tokens, and sends it at once."""
        at %= len(self.turns)
        last = at == len(self.turns) - 1
        if not last:
            self.flush(force=True)
        turn = self.turns[at]
        tokens = turn["tokens"]
        turn.clear()
        turn.update(head, tokens=tokens)
        start = self._start if last else None
        self._emit(at, len(tokens) if start is None else start)

    def follow(self, turns: Sequence[Any]) -> None:
        """Makes the transcript that of `turns` (of a session), sending only what differs."""
        for at, turn in enumerate(turns):
            head = self._head(turn)
            have = self.turns[at] if at < len(self.turns) else None
            common = None if have is None else _tokens_in_common(have, turn)
            if common == len(turn.tokens) and have == {**head, "tokens": self.turns[at]["tokens"]}:
                continue
            if common is None or at < len(self.turns) - 1:
                self.place(at, head, encode_tokens(turn.tokens))
                continue
            for token in encode_tokens(turn.tokens[common:]):
                self.append(token)
            self.rehead(head)
        self.truncate(len(turns))

    def truncate(self, length: int) -> None:
        """Drops the turns from number `length` on."""
        if length >= len(self.turns):
            return
        del self.turns[length:]
        if self.turns:
            self._emit(len(self.turns) - 1, len(self.turns[-1]["tokens"]))
        else:
            self._emit(0, 0)

    def flush(self, *, force: bool = False) -> bool:
        """Sends what waits, when it is time (or `force`); whether it did."""
        if self._start is None or not self.turns:
            return False
        if not force and self._clock() - self._sent_at < self._pause():
            return False
        self._emit(len(self.turns) - 1, self._start)
        return True

    def acknowledge(self, seq: int) -> None:
        """The front end has applied every delta up to `seq`; none that was never sent."""
        self._acknowledged = max(self._acknowledged, min(seq, self.seq))

    def snapshot(self) -> dict[str, Any]:
        """The whole transcript as it is now; deltas up to `seq` are in it."""
        turns = [{**turn, "tokens": list(turn["tokens"])} for turn in self.turns]
        return {"seq": self.seq, "turns": turns}

    def weight(self) -> int:
        """Bytes of the transcript as JSON, which is what a saved notebook would hold of it."""
        return len(json.dumps(self.turns, ensure_ascii=False).encode("utf-8", "replace"))

    def strip_alternatives(self, keep_turns: int = 0) -> None:
        """Drops the alternatives of all but the last `keep_turns` turns."""
        for turn in self.turns[: len(self.turns) - keep_turns]:
            turn["tokens"][:] = [{**token, "a": []} for token in turn["tokens"]]

    def _pause(self) -> float:
        crowded = self.seq - self._acknowledged > self._window
        return self._hold if crowded else self._interval

    def _emit(self, at: int, start: int) -> None:
        """Sends turn number `at`, its tokens from `start` on, as the transcript is now."""
        head, tokens = None, []
        if self.turns:
            turn = self.turns[at]
            head = {key: value for key, value in turn.items() if key != "tokens"}
            tokens = turn["tokens"][start:]
        self._start = None
        self.seq += 1
        self._sent_at = self._clock()
        place = {"seq": self.seq, "length": len(self.turns), "at": at}
        self._send({**place, "turn": head, "start": start, "tokens": tokens})
