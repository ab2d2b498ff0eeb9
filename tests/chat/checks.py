"""What must hold of every reply."""

from __future__ import annotations

import pytest

import gemma_nb as gnb

SAMPLING = gnb.Sampling(seed=1, max_new_tokens=12)


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
