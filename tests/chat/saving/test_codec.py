"""Whatever the records hold comes back as it was, also from fields that they do not have yet."""

import dataclasses
import json
import math
from typing import Any, Literal

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_nb.chat.records import Alternative, TokenRecord
from gemma_nb.chat.saving import codec
from gemma_nb.chat.saving.codec import Tables, from_json, to_json
from gemma_nb.chat.saving.columns import from_columns, to_columns
from gemma_nb.chat.saving.reader import decode_turn
from gemma_nb.chat.saving.writer import encode_turn
from gemma_nb.chat.turns import Turn


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Record:
    """A field of every type that can be stored."""

    number: int
    real: float
    flag: bool
    text: str
    choice: Literal["a", "b"]
    maybe: int | None
    pair: tuple[int, str]
    maybe_pair: tuple[int, int] | None
    many: tuple[int, ...]
    inner: Inner
    inners: tuple[Inner, ...]
    late: str = dataclasses.field(default="late", kw_only=True)


integers = st.integers(-(2**63), 2**63 - 1)
inners = st.builds(Inner, st.text(), st.floats())
records = st.builds(
    Record,
    integers,
    st.floats(),
    st.booleans(),
    st.text(),
    st.sampled_from(["a", "b"]),
    st.none() | integers,
    st.tuples(integers, st.text()),
    st.none() | st.tuples(integers, integers),
    st.lists(integers, max_size=40).map(tuple),
    inners,
    st.lists(inners, max_size=3).map(tuple),
    late=st.text(),
)


def same(a: Any, b: Any) -> bool:
    """Equality in which nan equals itself."""
    return repr(a) == repr(b)


def through_json(hint, value):
    tables = Tables()
    data = json.loads(json.dumps(to_json(value, tables), allow_nan=False))
    return from_json(hint, data, tables)


def through_columns(hint, values):
    tables = Tables()
    blob = safetensors.numpy.save(to_columns(hint, values, tables, "rows"))
    return from_columns(hint, len(values), safetensors.numpy.load(blob), tables, "rows")


@settings(max_examples=50)
@given(records)
def test_json_gives_back_what_it_was_given(record):
    assert same(through_json(Record, record), record)


@settings(max_examples=50)
@given(st.lists(records, max_size=5))
def test_columns_give_back_what_they_were_given(rows):
    assert same(through_columns(Record, rows), rows)


# As many as an int64 holds; everything else by its annotations.
alternatives = st.builds(Alternative, integers, st.text(), st.floats(), st.floats())
tokens = st.builds(
    TokenRecord,
    index=integers,
    token_id=integers,
    position=integers,
    rank=integers,
    alternatives=st.lists(alternatives, max_size=3).map(tuple),
    key=st.none() | st.tuples(integers, integers),
)
turns = st.builds(Turn, tokens=st.lists(tokens, max_size=3).map(tuple))


@settings(max_examples=30)
@given(turns)
def test_turns_come_back(turn):
    tables = Tables()
    data, columns = encode_turn(turn, tables)
    data = json.loads(json.dumps(data, allow_nan=False))
    assert same(decode_turn(data, columns, tables, ""), turn)


def test_floats_take_four_bytes_where_that_is_exact():
    exact = [float(np.float32(x)) for x in (0.1, -3.7, math.inf, math.nan)]
    assert to_columns(float, exact, Tables(), "x")["x"].dtype == np.float32
    assert to_columns(float, [0.1], Tables(), "x")["x"].dtype == np.float64


def test_arrays_keep_shape_and_dtype():
    rows = [np.arange(6, dtype=np.float16).reshape(2, 3), None, np.zeros((0, 4), np.float16)]
    back = through_columns(np.ndarray | None, rows)
    assert back[1] is None
    for one, other in ((back[0], rows[0]), (back[2], rows[2])):
        assert one.dtype == np.float16
        np.testing.assert_array_equal(one, other)


def test_what_is_long_and_repeated_is_stored_once():
    tables = Tables()
    long = tuple(range(1000))
    assert to_json(long, tables) == to_json(long, tables) == {"list": 0}
    assert from_json(tuple[int, ...], {"list": 0}, tables) is long


def test_a_field_that_a_file_lacks_takes_its_default():
    assert from_json(Inner, {"name": "x"}, Tables()) == Inner("x")
    columns = to_columns(Inner, [Inner("x", 2.0)], tables := Tables(), "rows")
    del columns["rows.weight"]
    assert from_columns(Inner, 1, columns, tables, "rows") == [Inner("x")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x", "size": 3}, "expected only name, weight, got 'size'"),
        ({"weight": 1.0}, "expected also name"),
        ({"name": 3}, "name: expected a value of type str, got 3"),
        ({"name": "x", "weight": "much"}, "weight: expected a number, got 'much'"),
        ([], "expected an object"),
    ],
)
def test_what_does_not_fit_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        from_json(Inner, data, Tables())


def test_columns_that_do_not_fit_are_named():
    tables = Tables()
    columns = to_columns(Alternative, [Alternative(1, "a", -0.5, 0.5)] * 3, tables, "x")
    short = {**columns, "x.logprob": columns["x.logprob"][:2]}
    with pytest.raises(ValueError, match=r"column 'x.logprob' of 3 numbers, got \(2,\)"):
        from_columns(Alternative, 3, short, tables, "x")
    nowhere = {**columns, "x.text": columns["x.text"] + 7}
    with pytest.raises(ValueError, match="indices of 1 strings"):
        from_columns(Alternative, 3, nowhere, tables, "x")
    without = {name: column for name, column in columns.items() if name != "x.token_id"}
    with pytest.raises(ValueError, match="columns for token_id"):
        from_columns(Alternative, 3, without, tables, "x")


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(TypeError, match="object"):
        to_json(object(), Tables())
    with pytest.raises(TypeError, match="cannot be columns"):
        to_columns(dict[str, int], [{}], Tables(), "x")
    assert codec.hints(Inner) == {"name": str, "weight": float}
