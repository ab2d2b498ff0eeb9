"""Tokens of a reply as columns: arrays of their evidence, of which each record shows a row."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast, overload

import numpy as np

from gemma_nb.chat.records import Alternative, TokenRecord
from gemma_nb.text.prefix import shared_prefix

# Of every token (n,), and of every alternative (n, k): 32 bits, or 64 where these lose something.
_INTEGERS = ("index", "token_id", "position", "rank", "seed", "fold")
_FLOATS = ("logprob", "probability", "entropy")
_ALTERNATIVE_FLOATS = ("alternative_logprob", "alternative_probability")
# Fields of a record, in its order, and then what makes its other ones.
_SCALARS = ["index", "token_id", "text", "piece", "position", *_FLOATS, "rank"]
_SCALARS += ["is_drawn", "seed", "fold", "attention_row"]
_FULL = 64  # records that become a block of columns


@functools.cache
def _layout(k: int, wide: bool) -> np.dtype[Any]:
    """One row: 265 bytes for ten alternatives.  Texts are references to strings that are shared."""
    integer, real, seed = ("i8", "f8", "i8") if wide else ("i4", "f4", "u4")
    return np.dtype(
        [
            *((name, seed if name == "seed" else integer) for name in _INTEGERS),
            *((name, real) for name in _FLOATS),
            ("is_drawn", "?"),
            ("text", "O"),
            ("piece", "O"),
            ("attention_row", "O"),
            ("count", "u4"),
            ("alternative_token_id", integer, (k,)),
            ("alternative_text", "O", (k,)),
            *((name, real, (k,)) for name in _ALTERNATIVE_FLOATS),
        ]
    )


class _Block:
    """Rows that replies share from one branch to another; they never change."""

    __slots__ = ("_records", "_scalars", "rows")

    def __init__(self, rows: np.ndarray) -> None:
        rows.flags.writeable = False
        self.rows = rows
        self._scalars: np.ndarray | None = None  # without the alternatives
        # A row's record is the same object for as long as anybody holds it.
        self._records: weakref.WeakValueDictionary[int, TokenRecord] | None = None

    def record(self, row: int) -> TokenRecord:
        """The record of a row."""
        if self._records is None or self._scalars is None:
            self._scalars = self.rows[_SCALARS]
            self._records = weakref.WeakValueDictionary()
        known = self._records.get(row)
        if known is not None:
            return known
        *fields, is_drawn, seed, fold, attention_row = self._scalars[row].item()
        made = TokenRecord(
            *(*fields, cast(Any, partial(self._alternatives, row))),
            key=(seed, fold) if is_drawn else None,
            attention_row=attention_row,
        )
        return self._records.setdefault(row, made)

    def _alternatives(self, row: int) -> tuple[Alternative, ...]:
        values = self.rows[row]
        names = ("token_id", "text", "logprob", "probability")
        columns = (values[f"alternative_{name}"][: values["count"]].tolist() for name in names)
        return tuple(map(Alternative, *columns))


class AlternativeColumns(NamedTuple):
    """The model's most likely tokens in the place of each token of a reply.

    Attributes:
      token_id: (n, k) ids, the most likely first.
      text: (n, k) strings, each token's on its own.
      logprob: (n, k) log-probabilities in nats, before the sampler.
      probability: (n, k) probabilities that the sampler drew with.
      count: (n,) how many of each row there are; the rest is filled with -1, "" and NaN.
    """

    token_id: np.ndarray
    text: np.ndarray
    logprob: np.ndarray
    probability: np.ndarray
    count: np.ndarray  # type: ignore[assignment]


class Tokens(Sequence[TokenRecord]):
    """A reply's tokens: a sequence of `TokenRecord`, and read-only arrays of all of them.

        turn.tokens[3].entropy
        turn.tokens.entropy  # (n,)
        turn.tokens.alternatives.probability  # (n, k)

    It compares and hashes as the tuple of its records.  A slice, and the reply of a fork, share
    their rows with what they were made from.
    """

    __slots__ = ("_parts",)

    def __init__(self, records: Iterable[TokenRecord] = ()) -> None:
        """Takes records, in columns.

        Raises:
          OverflowError: a number of more than 64 bits.
        """
        self._parts: tuple[tuple[_Block, int, int], ...] = ()
        if isinstance(records, Tokens):
            self._parts = records._parts
        elif rows := tuple(records):
            self._parts = _parts_of(_columns_of(rows))

    @classmethod
    def of_columns(cls, columns: Mapping[str, Any]) -> Tokens:
        """Tokens from their columns.

        Args:
          columns: (n,) by the fields of `TokenRecord`, where `key` is `is_drawn`, `seed` and
            `fold`, and `count` says how many alternatives each has; those of `Alternative`, with
            "alternative_" before their names, one after the other for all tokens.
        """
        made = cls()
        made._parts = _parts_of(columns)
        return made

    # --- a sequence of records ------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in self._parts)

    @overload
    def __getitem__(self, at: int) -> TokenRecord: ...

    @overload
    def __getitem__(self, at: slice) -> Tokens: ...

    def __getitem__(self, at: int | slice) -> TokenRecord | Tokens:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step == 1:
                return self._between(start, stop)
            return Tokens(self[i] for i in range(start, stop, step))
        left = range(len(self))[at]
        for block, start, stop in self._parts:
            if left < stop - start:
                return block.record(start + left)
            left -= stop - start
        raise IndexError(at)

    def __iter__(self) -> Iterator[TokenRecord]:
        for block, start, stop in self._parts:
            yield from map(block.record, range(start, stop))

    def __add__(self, other: Sequence[TokenRecord]) -> Tokens:
        if not isinstance(other, Tokens | tuple):
            return NotImplemented
        made = Tokens()
        made._parts = self._parts + Tokens(other)._parts
        return made

    def __radd__(self, other: Sequence[TokenRecord]) -> Tokens:
        return Tokens(other) + self if isinstance(other, tuple) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokens | tuple):
            return NotImplemented
        return tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> Any:
        return Tokens, (tuple(self),)

    def _between(self, first: int, last: int) -> Tokens:
        parts, begin = [], 0
        for block, start, stop in self._parts:
            low, high = max(start, start + first - begin), min(stop, start + last - begin)
            if low < high:
                parts.append((block, low, high))
            begin += stop - start
        made = Tokens()
        made._parts = tuple(parts)
        return made

    def spelling(self, ids: Sequence[int]) -> Tokens:
        """The leading tokens that spell the beginning of `ids`."""
        return self[: shared_prefix(self.token_id.tolist(), ids)]

    # --- columns --------------------------------------------------------------------------------

    @property
    def token_id(self) -> np.ndarray:
        """(n,) int ids."""
        return self.column("token_id")

    @property
    def text(self) -> np.ndarray:
        """(n,) strings: the text that each token added to the reply."""
        return self.column("text")

    @property
    def piece(self) -> np.ndarray:
        """(n,) strings: the text of each token on its own."""
        return self.column("piece")

    @property
    def position(self) -> np.ndarray:
        """(n,) int absolute positions in the context."""
        return self.column("position")

    @property
    def logprob(self) -> np.ndarray:
        """(n,) float log-probabilities in nats, before the sampler."""
        return self.column("logprob")

    @property
    def probability(self) -> np.ndarray:
        """(n,) float probabilities that the sampler drew with."""
        return self.column("probability")

    @property
    def entropy(self) -> np.ndarray:
        """(n,) float entropies of the model's distributions, in nats."""
        return self.column("entropy")

    @property
    def rank(self) -> np.ndarray:
        """(n,) int: how many tokens the model found more likely (0: its first choice)."""
        return self.column("rank")

    @property
    def alternatives(self) -> AlternativeColumns:
        """The model's most likely tokens in each place."""
        names = ("token_id", "text", "logprob", "probability")
        columns = {name: self.column(f"alternative_{name}") for name in names}
        return AlternativeColumns(**columns, count=self.column("count"))

    def alternative(self, name: str) -> np.ndarray:
        """One array over the alternatives of all tokens, in a row, as in `of_columns`."""
        parts = [block.rows[name][start:stop].ravel() for block, start, stop in self._parts]
        return np.concatenate([np.zeros(0, _layout(0, False)[name].base), *parts])

    def column(self, name: str) -> np.ndarray:
        """One array over all tokens, by the name that it has in `of_columns`."""
        parts = [block.rows[name][start:stop] for block, start, stop in self._parts]
        if not parts:
            return np.zeros(0, _layout(0, False))[name]
        if len(parts) == 1:
            return parts[0]
        if parts[0].ndim == 2:
            width = max(part.shape[1] for part in parts)
            parts = [_widened(part, width) for part in parts]
        joined = np.concatenate(parts)
        joined.flags.writeable = False
        return joined


class GrowingTokens:
    """Tokens of a reply in the making, which other threads may read at any time."""

    def __init__(self) -> None:
        # Replaced as a whole, or appended to: what is in columns, and the records after that.
        self._state: tuple[Tokens, list[TokenRecord]] = (Tokens(), [])

    @property
    def tokens(self) -> Tokens:
        """All tokens so far."""
        done, rest = self._state
        return done + tuple(rest)

    def extend(self, records: Sequence[TokenRecord]) -> None:
        """Adds records, or shares the rows of `Tokens`."""
        done, rest = self._state
        if isinstance(records, Tokens):
            self._state = done + tuple(rest) + records, []
            return
        rest.extend(records)
        if len(rest) >= _FULL:
            self._state = done + tuple(rest), []

    def replace_last(self, record: TokenRecord) -> None:
        """Puts another record in the place of the last one."""
        tokens = self.tokens
        self._state = tokens[:-1], [record]


def _columns_of(records: Sequence[TokenRecord]) -> dict[str, Any]:
    """The columns of records, as `Tokens.of_columns` takes them."""
    names = ("index", "token_id", "text", "piece", "position", *_FLOATS, "rank", "attention_row")
    columns: dict[str, Any] = {name: [getattr(r, name) for r in records] for name in names}
    keys = [record.key for record in records]
    columns["is_drawn"] = [key is not None for key in keys]
    columns["seed"] = [0 if key is None else key[0] for key in keys]
    columns["fold"] = [0 if key is None else key[1] for key in keys]
    each = [record.alternatives for record in records]
    columns["count"] = list(map(len, each))
    flat = list(itertools.chain.from_iterable(each))
    for name in ("token_id", "text", "logprob", "probability"):
        columns[f"alternative_{name}"] = [getattr(other, name) for other in flat]
    return columns


def _parts_of(columns: Mapping[str, Any]) -> tuple[tuple[_Block, int, int], ...]:
    """Blocks of rows with as many alternatives each: no row takes room for another one's."""
    parts, row, other = [], 0, 0
    for k, group in itertools.groupby(columns["count"]):
        n = sum(1 for _ in group)
        rows, others = slice(row, row + n), slice(other, other + n * k)
        part = {
            name: values[others if name.startswith("alternative_") else rows]
            for name, values in columns.items()
        }
        parts.append((_Block(_rows(part, n, k)), 0, n))
        row, other = rows.stop, others.stop
    return tuple(parts)


def _rows(columns: Mapping[str, Any], n: int, k: int) -> np.ndarray:
    """Rows of columns, as narrow as they can be without a loss."""
    integers = {m: np.asarray(columns[m], np.int64) for m in (*_INTEGERS, "alternative_token_id")}
    floats = {m: np.asarray(columns[m], np.float64) for m in (*_FLOATS, *_ALTERNATIVE_FLOATS)}
    numbers, narrow = {**integers, **floats}, _layout(0, False)
    wide = not all(_fits(values, narrow[name].base) for name, values in numbers.items())
    rows = np.zeros(n, _layout(k, wide))
    for name in rows.dtype.names or ():
        is_object = rows.dtype[name].base.hasobject
        values = (
            _objects(columns[name]) if is_object else np.asarray(numbers.get(name, columns[name]))
        )
        rows[name] = values.reshape(rows[name].shape)
    return rows


def _fits(values: np.ndarray, dtype: np.dtype[Any]) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(dtype), values, equal_nan=values.dtype.kind == "f")


def _objects(values: Sequence[Any]) -> np.ndarray:
    """Any objects, each as it is."""
    made = np.empty(len(values), object)
    made[:] = values
    return made


def _widened(column: np.ndarray, width: int) -> np.ndarray:
    """(n, k) with as many columns as others have."""
    fill = {"O": "", "f": np.nan}.get(column.dtype.kind, -1)
    padding = ((0, 0), (0, width - column.shape[1]))
    return np.pad(column, padding, constant_values=cast(Any, fill))
