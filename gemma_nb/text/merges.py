"""Merges of byte-pair encoding as scores of pieces, where the two say the same.

`tokenizers` joins the pair of pieces whose merge stands first in a list; SentencePiece joins the
pair whose joint piece has the best score.  A piece may be in the list several times ("the" of "t"
and "he", and of "th" and "e"), with ranks far apart, and pairs may be missing.

What happens inside a stretch of text that is not joined with its surroundings does not depend on
these: its best pair is the same with and without them.  So wherever two neighbours spell a piece,
they are the two that the piece's own text comes to, and of all its merges only the last one of its
own text is ever used.  With the rank of that merge as score, negated, SentencePiece has the same
pairs in the same order, and the results are equal for every text, if no text of a piece ends as two
pieces that the list does not join.

`scores` finds these merges in one pass over the list, by the rule that a merge is used if its parts
are there and nothing was joined before across the place where they meet.  The few texts in which a
part is formed after the merge's turn are followed step by step.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence

_NEVER = 1 << 60
_MOST_FOLLOWED = 20_000  # a second of computing
_BETWEEN = "\ufffe"  # a noncharacter


def scores(pieces: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, float] | None:
    """Scores under which SentencePiece joins what `merges` join, in the same order.

    Args:
      pieces: those that merges are about, each with an id of its own.
      merges: pairs, the first to be joined first; those of other pieces are never met.

    Returns:
      Piece -> score, 0 or less, of the pieces that some text comes to (of others any score would
      do); None where no scores give the same.
    """
    if len(last := dict(zip(merges, range(len(merges)), strict=True))) < len(merges):
        # Of a pair that is there twice the last counts.
        merges = [merge for at, merge in enumerate(merges) if last[merge] == at]
    table = _Table(pieces, merges)
    followed = table.doubtful()
    if len(followed) > _MOST_FOLLOWED:
        return None
    ranks = dict(zip(pieces, map(table.rank.__getitem__, pieces.values()), strict=True))
    for piece in followed:
        parts, ranks[piece] = table.follow(piece)
        if parts == 2:
            return None
    return {piece: -float(max(rank, 0)) for piece, rank in ranks.items() if rank != _NEVER}


def holding(pieces: Sequence[str], parts: Iterable[str]) -> set[str]:
    """The pieces in which one of `parts` occurs."""
    starts = list(itertools.accumulate((len(p) + 1 for p in pieces), initial=0))
    text = _BETWEEN.join(pieces)
    found: set[str] = set()
    for part in parts:
        at = text.find(part)
        while at >= 0:
            index = bisect.bisect_right(starts, at) - 1
            found.add(pieces[index])
            at = text.find(part, starts[index + 1])
    return found


class _Table:
    """What each piece is made of, by ids.

    Attributes:
      rank: by id, of the merge that forms the piece; -1 of a character, `_NEVER` where none does.
    """

    def __init__(self, pieces: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        self._pieces = pieces
        self._size = max(pieces.values(), default=0) + 2  # the last id is no piece's
        self.rank = [_NEVER] * self._size
        self._left, self._right = [0] * self._size, [0] * self._size
        self._pairs: dict[int, int] = {}  # left * size + right -> rank
        for piece, id_ in pieces.items():
            if len(piece) == 1:
                self.rank[id_] = -1
        self._late = self._form(merges)

    def _form(self, merges: Sequence[tuple[str, str]]) -> list[tuple[str, int, int]]:
        """Forms the pieces; gives (piece, left, right) of merges whose turn came too early."""
        id_of, rank, size, pairs = self._pieces.get, self.rank, self._size, self._pairs
        late = []
        for at, (one, other) in enumerate(merges):
            left, right, piece = id_of(one), id_of(other), id_of(one + other)
            if left is None or right is None or piece is None:
                continue
            pairs[left * size + right] = at
            if rank[piece] != _NEVER:
                continue
            if rank[left] == _NEVER or rank[right] == _NEVER:
                late.append((one + other, left, right))
            elif self._meet(left, right):  # looks at earlier merges only
                rank[piece], self._left[piece], self._right[piece] = at, left, right
        return late

    def _meet(self, left: int, right: int) -> bool:
        """Whether two pieces can stand side by side, before anything is done about it.

        Both are taken apart again, the one that was formed last first, to see whether something
        would have been joined across the place where they meet.
        """
        rank, pairs, size = self.rank, self._pairs, self._size
        while True:
            if rank[left] > rank[right]:
                limit, left = rank[left], self._right[left]
            elif rank[right] >= 0:  # at the same rank, what stands further left is joined first
                limit, right = rank[right] + 1, self._left[right]
            else:
                return True
            if pairs.get(left * size + right, _NEVER) < limit:
                return False

    def doubtful(self) -> list[str]:
        """Pieces that are not formed, or hold what is formed out of turn: the table may err."""
        rank, out_of_turn = self.rank, set()
        for piece, left, right in self._late:
            formed = max(rank[left], rank[right])
            if formed < rank[self._pieces[piece]] and formed != _NEVER and self._meet(left, right):
                out_of_turn.add(piece)
        never = (piece for piece, id_ in self._pieces.items() if rank[id_] == _NEVER)
        return list({*never, *holding(list(self._pieces), out_of_turn)})

    def follow(self, text: str) -> tuple[int, int]:
        """What encoding a text comes to: the number of its pieces, and the last merge's rank."""
        # A character that the vocabulary lacks is joined with nothing.
        ids = [self._pieces.get(char, self._size - 1) for char in text]
        names, rank = list(text), _NEVER
        while len(ids) > 1:
            keys = (left * self._size + right for left, right in itertools.pairwise(ids))
            best, at = min((self._pairs.get(key, _NEVER), i) for i, key in enumerate(keys))
            if best == _NEVER:
                break
            names[at : at + 2] = ["".join(names[at : at + 2])]
            ids[at : at + 2] = [self._pieces[names[at]]]
            rank = best
        return len(ids), rank if len(ids) == 1 else _NEVER
