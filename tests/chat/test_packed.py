"""Records keep their alternatives packed, and nobody can tell."""

import copy
import dataclasses
import pickle
import sys
import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gemma_nb.chat.events import Alternative, TokenEvent, TokenRecord

AS_COMPUTED = st.builds(
    Alternative,
    st.integers(0, 2**18),
    st.text(max_size=4),
    st.floats(max_value=0, width=32, allow_nan=False),
    st.floats(0, 1, width=32),
)
ANY = st.builds(Alternative, st.integers(), st.text(max_size=4), st.floats(), st.floats())


def record(alternatives, cls=TokenRecord, **more):
    return cls(0, 7, "a", "a", 5, -0.5, 0.5, 0.1, 0, alternatives, **more)


@given(st.lists(AS_COMPUTED | ANY, max_size=12).map(tuple))
def test_what_is_read_is_what_was_set(alternatives):
    made = record(alternatives)
    assert repr(made.alternatives) == repr(alternatives)  # unlike NaN, its name equals itself
    assert all(a.text is b.text for a, b in zip(made.alternatives, alternatives, strict=True))


@given(st.lists(AS_COMPUTED, max_size=12).map(tuple))
def test_records_compare_copy_and_convert_as_any_dataclass(alternatives):
    made = record(alternatives)
    assert made == record(alternatives)
    assert hash(made) == hash(record(alternatives))
    assert made != record((*alternatives, Alternative(1, "b", -1.0, 0.5)))
    for copied in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert copied == made
    assert dataclasses.replace(made, text="b").alternatives == alternatives
    assert dataclasses.asdict(made)["alternatives"] == tuple(map(dataclasses.asdict, alternatives))
    names = [f.name for f in dataclasses.fields(made)]
    assert names[-3:] == ["alternatives", "key", "attention_row"]


def test_events_are_packed_as_records_are():
    alternatives = (Alternative(1, "b", -1.0, 0.5),)
    event = record(alternatives, TokenEvent, cache_used=6, finish_reason=None)
    assert event.alternatives == alternatives
    assert pickle.loads(pickle.dumps(event)) == event


def test_a_record_takes_little_memory():
    texts = [sys.intern(f"text {i}") for i in range(10)]

    def one(index):
        numbers = np.random.default_rng(index).random(10).astype(np.float32)
        return record(
            tuple(
                Alternative(100_000 + i, text, -float(x), float(x))
                for i, (text, x) in enumerate(zip(texts, numbers, strict=True))
            )
        )

    one(0)
    tracemalloc.start(10)
    kept = [one(index) for index in range(100)]
    # What other threads of this process allocate meanwhile is not the records'.
    ours = tracemalloc.Filter(True, __file__, all_frames=True)
    traces = tracemalloc.take_snapshot().filter_traces([ours]).traces
    tracemalloc.stop()
    size = sum(trace.size for trace in traces)
    assert len(kept[7].alternatives) == 10
    assert 100 < size / len(kept) < 500  # four times that as objects; none if nothing is traced
