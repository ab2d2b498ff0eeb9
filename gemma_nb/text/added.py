"""Tokens that a fine-tune added to a vocabulary, and where they are in a text.

Follows the `tokenizers` library: added tokens are found first, the longest at each place, in the
text as it is or (`normalized`) with U+2581 for spaces; what is between them goes to byte-pair
encoding.  Most of them a SentencePiece model can hold as user-defined pieces, which are found in
the same way; the others are found here.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Sequence

SPACE = "\u2581"  # stands for the space in pieces

# Unicode's White_Space, which is not quite what Python's `isspace` takes.
_WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that was added to a vocabulary, or is treated as if it were.

    Attributes:
      content: how it is written.
      id: its row in the embedding.
      special: it is a control piece; others are text.
      normalized: found in text with U+2581 for spaces.
      lstrip, rstrip: it takes the white space before or after it along.
      single_word: found only where no letter, digit or underscore touches it.
    """

    content: str
    id: int
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def piece(self) -> str:
        """As a vocabulary spells it: control pieces as they are, text with U+2581 for spaces."""
        return self.content if self.special else self.content.replace(" ", SPACE)

    @property
    def is_found(self) -> bool:
        """Whether text can hold it; U+2581 is never in a text, but in a normalized one."""
        return not self.special and (self.normalized or SPACE not in self.content)

    @property
    def is_plain(self) -> bool:
        """Whether it is found wherever it stands, and nothing but it is taken."""
        return not (self.lstrip or self.rstrip or self.single_word)


def in_one_pass(tokens: Sequence[AddedToken]) -> bool:
    """Whether searching once, for the longest of all tokens, finds the same as the library.

    It searches for the tokens that are not normalized first, then for the others in what is left.
    """
    if not all(token.is_plain for token in tokens):
        return False
    first = {token.content for token in tokens if not token.normalized}
    starts = {content[:end] for content in first for end in range(1, len(content) + 1)}
    for token in tokens:
        if token.normalized:
            text = token.content.replace(SPACE, " ")
            for at in range(len(text)):
                inside = any(text[at:end] in first for end in range(at + 1, len(text) + (at > 0)))
                if inside or (at and text[at:] in starts):
                    return False
    return True


class Finder:
    """Finds added tokens in a text."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._tokens = tuple(tokens)
        self._passes = [
            _Pass([t for t in tokens if t.normalized is normalized]) for normalized in (False, True)
        ]

    def __reduce__(self) -> tuple[type[Finder], tuple[tuple[AddedToken, ...]]]:
        return Finder, (self._tokens,)

    def split(self, text: str) -> Iterator[str | int]:
        """The text's parts: ids of tokens, and what is between them."""
        first, second = self._passes
        for part in first.split(text):
            if isinstance(part, str):
                yield from second.split(part)
            else:
                yield part


class _Pass:
    """One search, for tokens that are all normalized or all not."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._tokens = {t.content.replace(SPACE, " "): t for t in tokens}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if tokens else None
        # Where spaces are written as U+2581, they are no white space.
        self._white = _WHITE.replace(" ", "") if tokens and tokens[0].normalized else _WHITE

    def split(self, text: str) -> Iterator[str | int]:
        done = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            token, (start, stop) = self._tokens[match[0]], match.span()
            if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop:])):
                continue
            if token.lstrip:
                start = max(done, len(text[:start].rstrip(self._white)))
            if token.rstrip:
                stop = len(text) - len(text[stop:].lstrip(self._white))
            if done < start:
                yield text[done:start]
            # In white space that another token took along one is found as well, except by `lstrip`.
            if start < stop:
                yield token.id
            done = stop
        if done < len(text):
            yield text[done:]


def _is_word(text: str) -> bool:
    """Whether a text begins with what regular expressions of Unicode call a word's character."""
    if not text:
        return False
    category = unicodedata.category(text[0])
    # Letters, marks, decimal digits, numbers that are letters, connectors; the joiners.
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or text[0] in "\u200c\u200d"
