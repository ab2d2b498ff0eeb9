"""Streams that are taken back, against a pass over the whole text."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb.sampling.cache import StreamCache, grow, rewind
from gemma_nb.sampling.settings import Sampling
from tests.sampling.streams import GREEDY, assert_evidence, random_ids


@pytest.mark.parametrize("own", [False, True])
def test_rewinding_and_growing_keep_the_model_form(tiny_model, own):
    config = tiny_model[0].config  # a window of 8
    cache = StreamCache.empty(config, 8, own=own)
    cache = cache.replace(positions=jnp.arange(8, dtype=jnp.int32), end_index=jnp.int32(8))
    back = rewind(cache, jnp.int32(3))
    assert back.positions.tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    assert int(back.end_index) == 3
    wide = grow(back, 12, config)
    assert wide.k[0].shape == ((8 if own else 12), 16)
    assert wide.k[2].shape == (12, 16)
    assert wide.positions.tolist() == [0, 1, 2] + [-1] * 9
    again = wide.updated(wide.to_model(config))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), wide, again))


@pytest.mark.parametrize("block", [128, 3])
@pytest.mark.parametrize("back", [60, 59, 52, 51, 31, 7, 1])
def test_a_stream_that_is_taken_back_goes_on_exactly(decoder, score, back, block, monkeypatch):
    """What the rings have overwritten comes back; the window is 8, the reply 60 tokens."""
    monkeypatch.setattr("gemma_nb.sampling.cache._REFILLED", block)
    ids = random_ids(7)
    evidences = [decoder.prefill(decoder.begin(ids, GREEDY))]
    evidences += [decoder.step() for _ in range(60)]
    said = [*ids, *(int(e.token) for e in evidences)]
    context = [*said[:back], *random_ids(3, seed=back)]
    rest = decoder.begin(context, Sampling(seed=4))
    assert len(rest) == len(context) - back
    evidences = [decoder.prefill(rest), *(decoder.step() for _ in range(20))]
    tokens = [*context, *(int(e.token) for e in evidences)]
    expected = score(tokens)
    for i, evidence in enumerate(evidences):
        assert_evidence(evidence, expected[len(context) - 1 + i])


def test_a_step_ahead_that_nobody_asks_for_is_taken_back(decoder, score):
    ids = random_ids(30)
    decoder.prefill(decoder.begin(ids, GREEDY))
    chosen = int(decoder.step().token)
    assert decoder._ahead is not None  # it has fed `chosen` already
    assert decoder.ids[:-1] == ids
    other = [*decoder.ids, chosen + 1]
    assert decoder.begin(other, GREEDY) == other[-1:]
    assert_evidence(decoder.prefill(other[-1:]), score(other)[-1])


class Asked:
    """A stream that is asked for one thing after another, each checked against a pass."""

    def __init__(self, decoder, score, draw):
        self.decoder, self.score, self.draw = decoder, score, draw
        self.say()

    @property
    def text(self):
        """What is cached, and what was chosen after it."""
        chosen = self.decoder._next
        return [*self.decoder.ids, *([] if chosen is None else [chosen])]

    def say(self):
        """Goes on with a part of the text, or all of it."""
        text = self.text
        kept = text[: self.draw.choice([0, len(text), *[self.draw.randint(0, len(text))] * 2])]
        ids = [*kept, *random_ids(self.draw.choice([1, 1, 2, 12]), seed=self.draw.randint(0, 9))]
        evidence = self.decoder.prefill(self.decoder.begin(ids[:150], GREEDY))
        assert_evidence(evidence, self.score(ids[:150])[-1])

    def again(self):
        """The same once more, as another reply to a message does."""
        ids = list(self.decoder.ids) or random_ids(3)
        assert_evidence(self.decoder.prefill(self.decoder.begin(ids, GREEDY)), self.score(ids)[-1])

    def step(self):
        for left in reversed(range(self.draw.choice([1, 2, 9]))):
            if self.decoder._next is not None and not self.decoder.full:
                evidence = self.decoder.step(last=left == 0 and self.draw.random() < 0.5)
                assert_evidence(evidence, self.score(self.decoder.ids)[-1])

    def put(self):
        if self.decoder._next is not None and not self.decoder.full:
            evidence = self.decoder.step(token=self.draw.randint(6, 259))
            expected = self.score(self.decoder.ids)[-1][int(evidence.token)]
            assert float(evidence.logprob) == pytest.approx(expected, abs=1e-5)

    def look(self):
        if self.decoder.ids:
            position = self.draw.randrange(len(self.decoder.ids))
            rows = self.decoder.inspect_position(position).attention
            np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-5)

    def residuals(self):
        """As a trace does after a reply, whose last token was chosen, but not fed."""
        ids = list(self.decoder.ids)
        text = [*ids, *random_ids(1, seed=len(ids))] if self.draw.random() < 0.3 else self.text
        self.decoder.residuals(text)
        assert self.decoder.ids == ids

    def keep(self):
        self.decoder.rewind_to(self.decoder.ids[: self.draw.randint(0, len(self.decoder.ids))])


@pytest.mark.parametrize("seed", range(12))
def test_whatever_a_stream_is_asked_for_it_goes_on_exactly(decoder, score, seed):
    """Whatever takes tokens back, the rings have what the next one sees; the window is 8."""
    draw = random.Random(seed)
    stream = Asked(decoder, score, draw)
    for _ in range(25):
        draw.choice([stream.say, stream.again, stream.step, stream.put, stream.look,
                     stream.residuals, stream.residuals, stream.keep])()  # fmt: skip
    stream.say()
