"""A reply's tokens are columns, and nobody who reads them as records can tell."""

import copy
import dataclasses
import pickle
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_nb.chat.events import TokenEvent
from gemma_nb.chat.records import Alternative, TokenRecord
from gemma_nb.chat.tokens import GrowingTokens, Tokens
from gemma_nb.chat.turns import Turn

short = st.floats(width=32, allow_nan=False)
integers = st.integers(-(2**63), 2**63 - 1)


def records_of(whole, real):
    alternatives = st.builds(Alternative, whole, st.text(max_size=4), real, real)
    return st.builds(
        TokenRecord,
        *(whole, whole, st.text(max_size=4), st.text(max_size=4), whole, real, real, real, whole),
        st.lists(alternatives, max_size=4).map(tuple),
        key=st.none() | st.tuples(whole, whole),
    )


AS_COMPUTED = records_of(st.integers(0, 2**18), short)
ANY = records_of(integers, st.floats())
LISTS = st.lists(AS_COMPUTED, max_size=6) | st.lists(ANY, max_size=6)


def record(index=0, alternatives=(), cls=TokenRecord, **more):
    return cls(index, 7, "a", "a", 5 + index, -0.5, 0.5, 0.125, 0, tuple(alternatives), **more)


@settings(max_examples=60)
@given(LISTS)
def test_what_is_read_is_what_was_given(given):
    tokens = Tokens(given)
    for one, same in zip(tokens, given, strict=True):
        # Unlike NaN, its name equals itself.
        assert repr(dataclasses.astuple(one)) == repr(dataclasses.astuple(same))
        for a, b in zip(one.alternatives, same.alternatives, strict=True):
            assert a.text is b.text


@settings(max_examples=60)
@given(st.lists(AS_COMPUTED, max_size=8), st.data())
def test_it_is_a_sequence_as_its_tuple_is(given, data):
    tokens, plain = Tokens(given), tuple(given)
    assert tokens == plain
    assert plain == tokens
    assert hash(tokens) == hash(plain)
    assert repr(tokens) == repr(plain)
    assert bool(tokens) == bool(plain)
    cut = data.draw(st.slices(len(plain)))
    at = data.draw(st.integers(0, len(plain)))
    assert tokens[cut] == plain[cut]
    joined = tokens[:at] + tokens[at:]
    assert joined == plain
    assert joined[cut] == plain[cut]
    assert plain[:at] + tokens[at:] == tokens[:at] + plain[at:] == plain
    assert [*joined] == [joined[i] for i in range(len(plain))]
    for copied in (copy.copy(tokens), copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens))):
        assert copied == tokens
    assert tokens != (*plain, record())


def test_columns_are_those_of_the_records():
    numbers = np.random.default_rng(0).random((6, 3)).astype(np.float32).tolist()
    rows = [
        record(i, [Alternative(10 * i + j, f"t{j}", -x, x) for j, x in enumerate(row[: i % 4])])
        for i, row in enumerate(numbers)
    ]
    tokens = Tokens(rows[:2]) + Tokens(rows[2:])
    for name in ("token_id", "text", "piece", "position", "logprob", "entropy", "rank"):
        column = getattr(tokens, name)
        assert column.shape == (6,)
        assert [getattr(row, name) for row in tokens] == column.tolist()
    others = tokens.alternatives
    assert others.probability.shape == (6, 3)
    assert others.count.tolist() == [len(row.alternatives) for row in rows]
    for name in ("token_id", "text", "logprob", "probability"):
        for row, values in zip(rows, getattr(others, name).tolist(), strict=True):
            expected = [getattr(other, name) for other in row.alternatives]
            assert values[: len(expected)] == expected
    assert np.isnan(others.probability[0]).all()
    with pytest.raises(ValueError, match="read-only"):
        Tokens(rows).entropy[0] = 1.0
    assert Tokens().entropy.shape == (0,)
    assert Tokens().alternatives.token_id.shape == (0, 0)


def test_siblings_share_rows_and_records():
    tokens = Tokens(record(i) for i in range(5))
    fork = tokens[:3] + Tokens([record(3)])
    assert fork[1] is tokens[1]
    assert fork[1:][1] is tokens[2]
    assert np.shares_memory(fork[:3].entropy, tokens.entropy)


def test_records_convert_as_any_dataclass():
    alternatives = (Alternative(1, "b", -1.0, 0.5),)
    for made in (record(0, alternatives), Tokens([record(0, alternatives)])[0]):
        assert dataclasses.replace(made, text="b").alternatives == alternatives
        assert dataclasses.asdict(made)["alternatives"] == (dataclasses.asdict(alternatives[0]),)
        assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
        names = [f.name for f in dataclasses.fields(made)]
        assert names[-3:] == ["alternatives", "key", "attention_row"]
    event = record(0, alternatives, TokenEvent, cache_used=6, finish_reason=None)
    assert event.alternatives == alternatives
    assert pickle.loads(pickle.dumps(event)) == event


def test_a_turn_takes_any_sequence_of_records():
    turn = Turn(1, "model", "a", (record(),))
    assert isinstance(turn.tokens, Tokens)
    assert turn == Turn(1, "model", "a", Tokens([record()]))
    assert dataclasses.replace(turn, tokens=[]).tokens == ()


def test_tokens_grow_and_are_read_meanwhile():
    growing, expected = GrowingTokens(), []
    growing.extend(Tokens(record(i) for i in range(3)))
    expected += [record(i) for i in range(3)]
    for i in range(3, 200):
        growing.extend([record(i)])
        expected.append(record(i))
        if i % 50 == 0:
            growing.replace_last(record(-i))
            expected[-1] = record(-i)
        assert growing.tokens == tuple(expected)


def test_a_token_takes_little_memory():
    texts = [sys.intern(f"text {i}") for i in range(10)]
    numbers = np.random.default_rng(0).random((100, 10)).astype(np.float32).tolist()

    def make():
        return Tokens(
            record(
                i,
                [Alternative(100_000 + j, texts[j], -x, x) for j, x in enumerate(row)],
                key=(1, i),
            )
            for i, row in enumerate(numbers)
        )

    make()
    tracemalloc.start(10)
    tokens = make()
    # What other threads of this process allocate meanwhile is not the tokens'.
    ours = tracemalloc.Filter(True, __file__, all_frames=True)
    traces = tracemalloc.take_snapshot().filter_traces([ours]).traces
    tracemalloc.stop()
    size = sum(trace.size for trace in traces)
    assert len(tokens[7].alternatives) == 10
    assert 100 < size / len(tokens) < 320  # 1.5 kB as objects; none if nothing is traced
