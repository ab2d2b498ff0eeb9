"""The compiled step: cache reuse, buckets and evidence, against passes without a cache."""

import numpy as np
import pytest

from gemma_nb.cpu.scores import SHORTLIST
from gemma_nb.sampling import compile_ahead, prefill
from gemma_nb.sampling.cache import next_size, size_for
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.draw import may_suffice
from gemma_nb.sampling.programs import StepProgram
from gemma_nb.sampling.settings import Sampling
from tests.sampling.streams import GREEDY, assert_evidence, random_ids


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

    monkeypatch.setattr(StepProgram, "run", fail)
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
        for p in (programs.decode_step, programs.first_prefill, programs.prefill)
        for part in (p.feed, p.choose, p.choose_short)
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


def test_a_long_prompt_finds_no_more_slots_than_its_pieces_need(tiny_model, score, monkeypatch):
    monkeypatch.setattr("gemma_nb.sampling.cache.SIZES", (48, 96, 148, 290, 580))
    monkeypatch.setattr("gemma_nb.sampling.decode._AT_ONCE", 48)
    monkeypatch.setattr("gemma_nb.sampling.compile_ahead._UNDISTURBED", -1)
    monkeypatch.setattr(compile_ahead, "begin", lambda jobs: begun.append(list(jobs)))
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
    decoder.rewind_to([2, 5])
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
