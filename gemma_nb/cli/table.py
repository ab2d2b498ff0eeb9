"""The table of alternatives: a reply's tokens, and what the model had considered at each."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma_nb.chat.records import TokenRecord
    from gemma_nb.chat.turns import Turn

ALTERNATIVES_SHOWN = 5
VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥"})


def print_table(turn: Turn) -> None:
    """Print, per token of the reply, the chosen one (marked ">") among its alternatives.

    Probabilities are the model's ("before" the sampler) and those that were drawn from ("after"
    temperature, top-k and so on).  Rank 1 is the model's most likely token; the entropy, in nats,
    is that of the model's distribution.
    """
    print(f"{'#':>4}   {'token':<20} {'before':>8} {'after':>8} {'rank':>6} {'entropy':>8}")
    for token in turn.tokens:
        for row in _table_rows(token):
            print(row)


def _table_rows(token: TokenRecord) -> Iterator[str]:
    rows = [
        (a.token_id, a.text, a.logprob, a.probability, rank)
        for rank, a in enumerate(token.alternatives[:ALTERNATIVES_SHOWN])
    ]
    if token.token_id not in [row[0] for row in rows]:
        rows.append((token.token_id, token.piece, token.logprob, token.probability, token.rank))
    number, entropy = f"{token.index:>4}", f" {token.entropy:8.3f}"
    for token_id, text, logprob, probability, rank in rows:
        mark = ">" if token_id == token.token_id else " "
        yield (
            f"{number:>4} {mark} {_pad(_visible(text), 20)}"
            f" {math.exp(logprob):8.2%} {probability:8.2%} {rank + 1:6d}{entropy}"
        )
        number = entropy = ""  # said once per token


def _visible(text: str) -> str:
    """The text with spaces, line breaks and other unprintable characters made visible."""
    shown = text.translate(VISIBLE)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _pad(text: str, width: int) -> str:
    # East Asian wide characters take two columns of a terminal.
    columns = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    return text + " " * max(0, width - columns)
