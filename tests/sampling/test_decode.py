"""The compiled step: cache reuse, buckets and evidence, against passes without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb.sampling import prefill
from gemma_nb.sampling.cache import StreamCache, grow, rewind, size_for
from gemma_nb.sampling.decode import Decoder, _step
from gemma_nb.sampling.methods import Sampling

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


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 100, 128, 129, 161])
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


def test_prefill_can_be_ended_between_pieces(decoder, monkeypatch):
    monkeypatch.setattr(prefill, "BUCKETS", (32,))
    rest = decoder.begin(random_ids(100), GREEDY)
    seen = []

    def between(fed):
        seen.append(fed)
        return fed < 64

    assert decoder.prefill(rest, between) is None
    assert seen == [32, 64]
    assert len(decoder.ids) == 64


def test_a_failed_step_leaves_a_stream_that_starts_over(decoder, score, monkeypatch):
    ids = random_ids(12)
    decoder.prefill(decoder.begin(ids, GREEDY))

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr("gemma_nb.sampling.decode._step", fail)
    with pytest.raises(MemoryError):
        decoder.step()
    monkeypatch.undo()
    assert decoder.begin(ids, GREEDY) == ids
    assert_evidence(decoder.prefill(ids), score(ids)[-1])


def test_settings_do_not_recompile(decoder):
    ids = random_ids(9)
    decoder.prefill(decoder.begin(ids, GREEDY))
    compiled = _step._cache_size()
    for sampling in (Sampling(seed=5), Sampling(temperature=2, top_k=3, forbidden=(8,), seed=6)):
        decoder.prefill(decoder.begin(random_ids(9, seed=sampling.seed), sampling))
    assert _step._cache_size() == compiled


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
    assert size_for(10, 4096) == 1024
    assert size_for(1025, 4096) == 4096
    assert size_for(10, 300) == 300
    assert size_for(5000, 6000) == 6000


def test_rewinding_and_growing_keep_the_model_form(tiny_model):
    config = tiny_model[0].config
    cache = StreamCache.empty(config, 8)
    cache = cache.replace(positions=jnp.arange(8, dtype=jnp.int32), end_index=jnp.int32(8))
    back = rewind(cache, jnp.int32(3))
    assert back.positions.tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    assert int(back.end_index) == 3
    wide = grow(back, 12)
    assert wide.k[0].shape == (12, 16)
    assert wide.positions.tolist() == [0, 1, 2] + [-1] * 9
    again = StreamCache.from_model(wide.to_model(config))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), wide, again))
