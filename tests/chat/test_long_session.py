"""Hundreds of turns in one session: nothing piles up but the conversation itself."""

import gc

import jax

from gemma_nb.chat.records import Alternative, TokenRecord
from tests.bench.long_session import session

TURNS = 40


def counts():
    """Live device arrays, and objects of the garbage collector that are not the conversation's."""
    gc.collect()
    kinds = [type(x) for x in gc.get_objects()]
    return len(jax.live_arrays()), sum(k not in (TokenRecord, Alternative) for k in kinds)


def test_nothing_piles_up_but_the_conversation(tiny_model):
    chat = session(*tiny_model, tokens=8, cache_length=100)
    seen = []
    for count in range(3 * TURNS):
        turn = chat.chat(f" Message {count % 10}.")
        assert len(turn.tokens) == 8
        assert turn.timing.prompt_tokens <= chat.cache_length
        if (count + 1) % TURNS == 0:
            seen.append(counts())
    arrays, objects = zip(*seen, strict=True)
    assert arrays[2] == arrays[1]
    # A turn is a few dozen objects besides its tokens and their alternatives.
    assert (objects[2] - objects[1]) / TURNS < 80
    assert turn.context.dropped > TURNS
    assert len(chat.tree) == 2 * 3 * TURNS


def test_a_turn_holds_no_copy_of_what_all_turns_share(tiny_model):
    chat = session(*tiny_model, tokens=4, cache_length=100)
    first, second = chat.chat("Hello"), chat.chat("Hello")
    for turn in (first, second):
        # Not the thousands of pieces that no template allows.
        assert turn.sampling.forbidden == chat.sampling.forbidden
    assert first.sampling.forbidden is not None
    texts = {a.text: a.text for r in first.tokens for a in r.alternatives}
    for alternative in (a for r in second.tokens for a in r.alternatives):
        if alternative.text in texts:
            assert alternative.text is texts[alternative.text]
