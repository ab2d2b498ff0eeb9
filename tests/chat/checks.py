"""What must hold of every reply and of every conversation that comes back."""

from __future__ import annotations

import dataclasses

import pytest

import gemma_nb as gnb
from gemma_nb.chat.saving import archive

SAMPLING = gnb.Sampling(seed=1, max_new_tokens=12)


def evidence(record):
    """A record without what depends on its neighbours or on who put it there."""
    return dataclasses.replace(record, text="", key=None)


def ids(turn):
    return [record.token_id for record in turn.tokens]


def assert_parity(chat, turn, score):
    """Every token of the turn was chosen from what a pass over the whole context computes."""
    ids = chat.tokens(turn)
    expected = score(ids)
    for index, record in enumerate(turn.tokens):
        row = expected[record.position - 1]
        assert record.index == index
        assert ids[record.position] == record.token_id
        assert record.logprob == pytest.approx(row[record.token_id], abs=2e-5)
        assert record.rank == pytest.approx((row > row[record.token_id]).sum(), abs=1)
        for alternative in record.alternatives:
            assert alternative.logprob == pytest.approx(row[alternative.token_id], abs=2e-5)


def assert_same_tree(tree, other):
    assert list(tree) == list(other)
    for one, same in zip(tree.nodes(), other.nodes(), strict=True):
        assert (one.id, one.active, one.undone) == (same.id, same.active, same.undone)


def assert_same(chat, other):
    assert_same_tree(chat.tree, other.tree)
    for name in ("system", "sampling", "capture", "cache_length", "when_full"):
        assert getattr(chat, name) == getattr(other, name)


def rewritten(path, **changes):
    """The file with some of the members of its conversation.json replaced, or left out (None)."""
    structure, evidence = archive.read(path)
    structure = {k: v for k, v in {**structure, **changes}.items() if v is not None}
    archive.write(path, structure, evidence.items())
    return path
