"""The compiled step: cache reuse, buckets and evidence, against passes without a cache."""

import logging
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb.cpu.head import SHORTLIST
from gemma_nb.sampling import ahead, prefill
from gemma_nb.sampling.ahead import COMPILING
from gemma_nb.sampling.cache import StreamCache, grow, next_size, rewind, size_for
from gemma_nb.sampling.choose import may_suffice
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.methods import Sampling
from gemma_nb.sampling.step import Program

GREEDY = Sampling(temperature=0, seed=0)


@pytest.fixture
def decoder(tiny_model):
    return Decoder(tiny_model[0], limit=200, top_k=12)


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(6, 260, count).tolist()


def assert_evidence(evidence, log_probabilities):
    """The evidence is that of the whole distribution."""
    p = np.exp(log_probabilities)
    order = np.argsort(-log_probabilities, kind="stable")
    token = int(evidence.token)
    assert set(evidence.ids.tolist()) == set(order[: len(evidence.ids)].tolist())
    np.testing.assert_allclose(evidence.logprobs, log_probabilities[evidence.ids], atol=1e-5)
    assert float(evidence.logprob) == pytest.approx(log_probabilities[token], abs=1e-5)
    assert float(evidence.entropy) == pytest.approx(-(p * log_probabilities).sum(), abs=1e-5)
    assert int(evidence.rank) == (log_probabilities > log_probabilities[token] + 1e-6).sum()


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 65, 100, 161])
def test_any_bucket_gives_the_same_evidence(decoder, score, length):
    ids = random_ids(length)
    evidence = decoder.prefill(decoder.begin(ids, Sampling(seed=1)))
    assert decoder.ids == ids
    assert_evidence(evidence, score(ids)[-1])


def test_decoding_equals_the_full_pass_at_every_position(decoder, score):
    """Across the edge of the sliding window (8) and of a growing cache."""
    ids = random_ids(5)
    evidences = [decoder.prefill(decoder.begin(ids, Sampling(seed=2)))]
    evidences += [decoder.step() for _ in range(60)]
    tokens = [*ids, *(int(e.token) for e in evidences)]
    expected = score(tokens)
    for i, evidence in enumerate(evidences):
        assert_evidence(evidence, expected[len(ids) - 1 + i])


def test_what_is_cached_is_not_fed_again(decoder, score):
    first = random_ids(40)
    decoder.prefill(decoder.begin(first, GREEDY))
    decoder.step()
    second = [*first[:30], *random_ids(10, seed=1)]
    rest = decoder.begin(second, GREEDY)
    assert rest == second[30:]
    assert_evidence(decoder.prefill(rest), score(second)[-1])


def test_the_same_context_again_feeds_one_token(decoder, score):
    ids = random_ids(20)
    decoder.prefill(decoder.begin(ids, GREEDY))
    assert decoder.begin(ids, GREEDY) == ids[-1:]
    assert_evidence(decoder.prefill(ids[-1:]), score(ids)[-1])


def test_the_cache_grows_and_keeps_what_it_holds(tiny_model, score, monkeypatch):
    monkeypatch.setattr("gemma_nb.sampling.cache.SIZES", (16, 64))
    decoder = Decoder(tiny_model[0], limit=40, top_k=12)
    ids = random_ids(10)
    evidences = [decoder.prefill(decoder.begin(ids, GREEDY))]
    evidences += [decoder.step() for _ in range(30)]
    assert decoder.full
    assert decoder._cache.size == 40
    tokens = [*ids, *(int(e.token) for e in evidences)]
    expected = score(tokens)
    for i, evidence in enumerate(evidences):
        assert_evidence(evidence, expected[9 + i])
    with pytest.raises(RuntimeError, match="room for one more"):
        decoder.step()


def test_contexts_that_do_not_fit_are_refused(decoder):
    for ids in ([], random_ids(201)):
        with pytest.raises(ValueError, match="1 to 200 tokens"):
            decoder.begin(ids, GREEDY)


def test_prefill_can_be_ended_between_pieces(decoder, score, monkeypatch):
    monkeypatch.setattr(prefill, "BUCKETS", (32,))
    ids = random_ids(100)
    rest = decoder.begin(ids, GREEDY)
    seen = []

    def between(fed, total):
        seen.append((fed, total))
        return fed < 64

    assert decoder.prefill(rest, between) is None
    assert seen == [(32, 100), (64, 100)]
    assert len(decoder.ids) == 64
    # The rest of it is another prompt; what ends after its last piece is not ended.
    seen.clear()
    rest = decoder.begin(ids, GREEDY)
    assert_evidence(decoder.prefill(rest, between), score(ids)[-1])
    assert seen == [(32, 36), (36, 36)]


def test_a_failed_step_leaves_a_stream_that_starts_over(decoder, score, monkeypatch):
    ids = random_ids(12)
    decoder.prefill(decoder.begin(ids, GREEDY))

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(Program, "run", fail)
    with pytest.raises(MemoryError):
        decoder.step()
    monkeypatch.undo()
    assert decoder.begin(ids, GREEDY) == ids
    assert_evidence(decoder.prefill(ids), score(ids)[-1])


def sizes(decoder):
    """For how many shapes each program was compiled."""
    programs = decoder._programs
    parts = [
        part
        for p in (programs.one, programs.first, programs.many)
        for part in (p.feed, p.choose, p.short)
    ]
    return [part.count() for part in parts if part is not None]


def test_a_shortlist_without_allowed_tokens_is_not_chosen_from(decoder, score):
    """Only when it is computed does it show how many of the shortlist are forbidden."""
    ids = random_ids(20, seed=4)
    expected = score(ids)[-1]
    order = np.argsort(-expected, kind="stable")
    assert len(order) > SHORTLIST + 2
    allowed = [int(i) for i in order[[SHORTLIST, -1]]]
    sampling = Sampling(temperature=0, forbidden=tuple(set(order.tolist()) - set(allowed)), seed=0)
    assert may_suffice(sampling)
    evidence = decoder.prefill(decoder.begin(ids, sampling))
    assert int(evidence.token) == allowed[0]
    assert float(evidence.probability) == 1
    assert_evidence(evidence, expected)


def test_settings_do_not_recompile(decoder):
    ids = random_ids(9)
    # The second of them may draw any token, for which there is another program.
    for sampling in (GREEDY, Sampling(seed=0)):
        decoder.prefill(decoder.begin(ids, sampling))
        decoder.step()
        decoder.reset()
    compiled = sizes(decoder)
    for sampling in (
        Sampling(top_p=0.5, seed=5),
        Sampling(temperature=2, top_k=3, forbidden=(8,), seed=6),
        Sampling(repetition_penalty=2, min_p=0.1, seed=7),
    ):
        decoder.prefill(decoder.begin(random_ids(9, seed=sampling.seed), sampling))
    assert sizes(decoder) == compiled


def test_the_repetition_penalty_sees_prompt_and_reply(decoder):
    """With an enormous penalty no token comes twice, nor one of the prompt's."""
    ids = random_ids(10)
    sampling = Sampling(temperature=0, repetition_penalty=1e6, seed=0)
    evidences = [decoder.prefill(decoder.begin(ids, sampling))]
    evidences += [decoder.step() for _ in range(40)]
    tokens = [int(e.token) for e in evidences]
    positive = [t for t, e in zip(tokens, evidences, strict=True) if float(e.logprob) > -20]
    assert len(set(positive)) == len(positive)
    assert not set(positive) & set(ids)


def test_chunks_cover_the_prompt_in_order():
    for length in (1, 5, 32, 33, 700, 1300):
        pieces = list(prefill.chunks(range(length), start=3))
        real = [(t[0, : last + 1], p[0, : last + 1]) for t, p, last in pieces]
        assert np.concatenate([t for t, _ in real]).tolist() == list(range(length))
        positions = np.concatenate([p for _, p in real])
        assert positions.tolist() == list(range(3, 3 + length))
        assert all((p[0, last + 1 :] == -1).all() for _, p, last in pieces)
        assert {t.shape[1] for t, _, _ in pieces} <= {1, *prefill.BUCKETS}


def test_cache_sizes():
    assert size_for(10, 4096) == 256
    assert size_for(1025, 4096) == 2048
    assert size_for(10, 200) == 200
    assert size_for(5000, 6000) == 6000
    assert next_size(256, 4096) == 512
    assert next_size(4096, 5000) == 5000
    assert next_size(5000, 5000) is None


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
            rows = self.decoder.look(position).attention
            np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-5)

    def residuals(self):
        """As a trace does after a reply, whose last token was chosen, but not fed."""
        ids = list(self.decoder.ids)
        text = [*ids, *random_ids(1, seed=len(ids))] if self.draw.random() < 0.3 else self.text
        self.decoder.residuals(text)
        assert self.decoder.ids == ids

    def keep(self):
        self.decoder.keep(self.decoder.ids[: self.draw.randint(0, len(self.decoder.ids))])


@pytest.mark.parametrize("seed", range(12))
def test_whatever_a_stream_is_asked_for_it_goes_on_exactly(decoder, score, seed):
    """Whatever takes tokens back, the rings have what the next one sees; the window is 8."""
    draw = random.Random(seed)
    stream = Asked(decoder, score, draw)
    for _ in range(25):
        draw.choice([stream.say, stream.again, stream.step, stream.put, stream.look,
                     stream.residuals, stream.residuals, stream.keep])()  # fmt: skip
    stream.say()


def test_the_next_size_is_compiled_before_it_is_needed(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr("gemma_nb.sampling.cache.SIZES", (48, 96, 192))
    ahead.begun.cache_clear()  # of other tests
    decoder = Decoder(tiny_model[0], limit=150, top_k=5)
    compiled = []
    compile_ = Program.compile

    def noted(program, cache, *rest):
        compiled.append((cache.size, threading.current_thread().name))
        compile_(program, cache, *rest)

    monkeypatch.setattr(Program, "compile", noted)
    decoder.prefill(decoder.begin(random_ids(20), GREEDY))
    for _ in range(5):
        decoder.step()
    for thread in threading.enumerate():
        if thread.name == COMPILING:
            thread.join()
    # The next prompt's, and those of the next size.
    assert sorted(compiled) == [(48, COMPILING)] * 2 + [(96, COMPILING)] * 3
    assert decoder._cache.size == 48
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        while decoder._cache.size == 48:
            decoder.step()
        decoder.step()
    assert "Compiling jit(_widen)" in caplog.text
    main = [r.getMessage() for r in caplog.records if r.threadName == "MainThread"]
    assert not [message for message in main if "jit(step" in message]
    for _ in range(40):
        decoder.step()
    assert decoder._cache.size == 96


def test_a_long_prompt_finds_no_more_slots_than_its_pieces_need(tiny_model, score, monkeypatch):
    monkeypatch.setattr("gemma_nb.sampling.cache.SIZES", (48, 96, 148, 290, 580))
    monkeypatch.setattr("gemma_nb.sampling.decode._AT_ONCE", 48)
    monkeypatch.setattr("gemma_nb.sampling.decode._ALONE", -1)
    monkeypatch.setattr(ahead, "begin", lambda jobs: begun.append(list(jobs)))
    begun: list = []
    decoder, ids = Decoder(tiny_model[0], limit=580, top_k=5), random_ids(148)
    sizes = []

    def between(done, count):
        sizes.append((done, decoder.cache.size))
        assert not any(begun)  # what runs beside a prompt slows it down
        return done <= count

    rest = decoder.begin(ids, GREEDY)
    assert decoder.cache.size == 48
    evidence = decoder.prefill(rest, between)
    # The last piece has room for what is chosen after it as well.
    assert sizes == [(64, 96), (128, 148), (148, 290)]
    assert not any(begun)  # nor beside the first step, which may have to be compiled itself
    assert_evidence(evidence, score(ids)[-1])
    assert_evidence(decoder.step(), score(decoder.ids)[-1])
    assert any(begun)


def test_a_token_that_is_put_there_has_its_own_evidence(decoder, score):
    """Drawn or not, likely or not; what follows is chosen after it."""
    ids = random_ids(20)
    given = random_ids(5, seed=9)
    for sampling in (GREEDY, Sampling(top_k=12, top_p=0.9, seed=3)):
        rest = decoder.begin(ids, sampling)
        evidences = [decoder.prefill(rest, token=given[0])]
        evidences += [decoder.step(token=token) for token in given[1:]]
        assert [int(e.token) for e in evidences] == given
        evidences += [decoder.step() for _ in range(12)]
        tokens = [*ids, *(int(e.token) for e in evidences)]
        expected = score(tokens)
        for i, evidence in enumerate(evidences):
            assert_evidence(evidence, expected[len(ids) - 1 + i])
        assert decoder.ids == tokens[:-1]


def test_nothing_is_computed_after_the_last_token(decoder):
    decoder.prefill(decoder.begin([2, 5, 7], Sampling(temperature=0, seed=0)))
    expected = [int(decoder.step().token) for _ in range(3)]
    decoder.keep([2, 5])
    decoder.prefill(decoder.begin([2, 5, 7], Sampling(temperature=0, seed=0)))
    tokens = [int(decoder.step(last=last).token) for last in (False, True, False)]
    assert tokens == expected  # also the one that was not the last after all
    decoder.step(last=True)
    assert decoder._ahead is None


def test_a_token_may_be_put_where_a_step_ahead_has_chosen(decoder, score):
    ids = random_ids(30)
    sampling = Sampling(top_k=5, temperature=2.0, repetition_penalty=1.2, seed=8)
    evidences = [decoder.prefill(decoder.begin(ids, sampling))]
    for given in (None, None, 77, None, 9, 10, None, None):
        evidences.append(decoder.step(given))
        assert given in (None, int(evidences[-1].token))
    tokens = [*ids, *(int(e.token) for e in evidences)]
    expected = score(tokens)
    for i, evidence in enumerate(evidences):
        assert_evidence(evidence, expected[len(ids) - 1 + i])
    # The others are drawn as they would have been after these tokens.
    again = decoder.prefill(decoder.begin(tokens[:-1], sampling))
    assert int(again.token) == tokens[-1]
    for token in (-1, 10_000):
        with pytest.raises(ValueError, match="token ids must lie in 0 to"):
            decoder.step(token=token)


def test_a_token_that_is_put_there_does_not_recompile(decoder):
    ids = random_ids(9)
    decoder.prefill(decoder.begin(ids, GREEDY))
    decoder.step()
    compiled = sizes(decoder)
    for token in (7, 200):
        decoder.step(token=token)
        decoder.prefill(decoder.begin(random_ids(9, seed=token), GREEDY), token=token)
    assert sizes(decoder) == compiled


def test_warming_up_compiles_the_next_size_too(tiny_model, monkeypatch):
    sizes = []
    monkeypatch.setattr(Program, "compile", lambda program, cache, *rest: sizes.append(cache.size))
    ahead.begun.cache_clear()  # of other tests
    for _ in range(2):  # a second stream of the model finds it done
        decoder = Decoder(tiny_model[0], limit=1024, top_k=5)
        decoder.compile()
        for thread in threading.enumerate():
            if thread.name == COMPILING:
                thread.join()
    assert sizes == [256] * 2 + [512] * 3
    assert decoder.ids == []
