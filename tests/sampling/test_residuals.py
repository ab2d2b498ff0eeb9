"""The residual stream that decoding keeps, and what a trace of a chat makes of it."""

import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.interp import programs
from gemma_nb.interp.passes import Pass
from gemma_nb.sampling import residuals
from gemma_nb.sampling.residuals import Residuals

CONFIG = gnb.presets.GEMMA3_270M


def rows(start: int, stop: int, mark: float = 0.0, padding: int = 0) -> list[np.ndarray]:
    """(T, 2) of three layers; each number says where it belongs."""
    at = np.arange(start, stop + padding, dtype=np.float32)
    return [np.stack([at + mark, np.full_like(at, layer)], 1) for layer in range(3)]


def write(kept: Residuals, start: int, stop: int, **how: float) -> None:
    """As the decoder does: a single token's rows come as one array."""
    layers = rows(start, stop, **how)
    kept.write(start, np.stack(layers) if len(layers[0]) == 1 else layers, stop - start)


def test_what_is_written_comes_out_by_layer():
    kept = Residuals(CONFIG)
    for start, stop in (
        (0, 1),
        (1, 100),
        (100, 101),
        (101, 356),
        *((i, i + 1) for i in range(356, 430)),
    ):
        write(kept, start, stop, padding=int(stop - start > 1))
    for count in (300, 357, 425):
        found = kept.first(count)
        assert found.length == count
        assert found.before(0) is None, "that is the embedding"
        for layer in (1, 2, 3):
            np.testing.assert_array_equal(found.before(layer), rows(0, count)[layer - 1])
    assert kept.first(1000).length == 430


@pytest.mark.parametrize("at", [70, 100, 110, 120])
def test_what_was_given_stays_when_something_else_takes_its_place(at):
    kept = Residuals(CONFIG)
    write(kept, 0, 100)
    for i in range(100, 120):
        write(kept, i, i + 1)
    found = kept.first(120)
    for i in range(at, at + 5):
        write(kept, i, i + 1, mark=0.5)
    np.testing.assert_array_equal(found.before(1), rows(0, 120)[0])
    again = kept.first(200)
    assert again.length == at + 5
    np.testing.assert_array_equal(again.before(1)[:at], rows(0, at)[0])
    np.testing.assert_array_equal(again.before(1)[at:], rows(at, at + 5, mark=0.5)[0])


def test_it_keeps_what_fits(monkeypatch):
    monkeypatch.setattr(residuals, "_LIMIT_BYTES", 100 * 4 * CONFIG.num_layers * CONFIG.embed_dim)
    kept = Residuals(CONFIG)
    for start, stop in ((0, 80), (80, 120), (120, 121)):
        write(kept, start, stop)
    assert kept.first(121).length == 80
    write(kept, 60, 90)
    assert kept.first(121).length == 90
    given = kept.first(90)
    write(kept, 201, 202)
    assert kept.first(202).length == 0, "a text of twice as many tokens"
    assert given.before(1).shape == (90, 2)


@pytest.fixture(scope="module")
def chat(tiny_model):
    """Some 600 tokens in two turns, the end of the first one taken back."""
    chat = gnb.ChatSession(*tiny_model, template="none", cache_length=1024)
    chat.sampling = gnb.Sampling(seed=0, max_new_tokens=20, forbidden=(1, 5))
    chat.chat("a" * 300)
    chat.regenerate()
    chat.chat("b" * 260)
    return chat


def test_a_trace_takes_over_what_replying_has_computed(chat, tiny_model, monkeypatch):
    plain = Pass(tiny_model[0], np.asarray(chat.tokens(), np.int32))
    expected = [plain.residual(i + 1)[0, : len(plain.ids)] for i in range(3)]
    maps = gnb.trace(tiny_model[0], plain.ids).attention.values
    through = []
    run = programs.run_block
    monkeypatch.setattr(programs, "run_block", lambda *a: through.append(a[3]) or run(*a))
    trace = chat.trace(sites=())
    for layer in (2, 0):
        got = trace.get("attention", layers=layer, heads=1).values[0, 0]
        np.testing.assert_allclose(got, maps[layer, 1], atol=1e-5)
    np.testing.assert_allclose(trace.residual, expected, atol=1e-5)
    assert not any(through), "the whole text went through a layer"


def test_only_what_was_computed_under_the_same_interventions_counts(chat):
    turn = chat.intervene(gnb.AblateHeads({1: [0]}), at=5)
    (known,) = chat.trace(turn, sites=()).source._known.values()
    assert known.length == len(chat.tokens(turn))
    chat.chat("c")  # without the interventions again
    assert not chat.trace(turn, sites=()).source._known
    (known,) = chat.trace(sites=()).source._known.values()
    assert known.length == len(chat.tokens())


def test_a_conversation_that_is_looked_into_goes_on_as_if_it_was_not(tiny_model):
    replies = []
    for look in (False, True):
        chat = gnb.ChatSession(*tiny_model, template="none", cache_length=1024)
        chat.sampling = gnb.Sampling(seed=0, max_new_tokens=20, forbidden=(1, 5))
        for message in ("a" * 530, "b"):
            turn = chat.chat(message)
            if look:
                held = list(chat._decoder.ids)
                (known,) = chat.trace(sites=()).source._known.values()
                assert known.length == len(held) + 1, "the last token was fed"
                assert chat._decoder.ids == held
        replies.append([(t.token_id, t.logprob, t.entropy) for t in turn.tokens])
    assert replies[0] == replies[1], "bit for bit"


def test_int8_layers_are_not_taken_for_the_parameters(tiny_model):
    chat = gnb.ChatSession(tiny_model[0].replace(storage="int8"), tiny_model[1], template="none")
    chat.sampling = gnb.Sampling(seed=0, max_new_tokens=2)
    chat.chat("a")
    assert chat._decoder.ids
    assert chat._decoder.residuals(chat.tokens()).length == 0


@pytest.mark.real
def test_on_the_default_model_it_is_what_a_pass_computes(real_model):
    """At every position, as near as float32 comes with sums in another order.

    Allowed is what cached decoding is allowed beside a pass in `make parity`; measured: 5.2e-6.
    """
    model, tokenizer = real_model
    chat = gnb.ChatSession(model, tokenizer, template="none")
    chat.sampling = gnb.Sampling(seed=0, max_new_tokens=4)
    chat.chat("The keeper counted ships by their lights alone, a brig from a schooner. " * 36)
    trace = chat.trace(sites=())
    plain = Pass(model, trace.tokens)
    known = next(iter(trace.source._known.values()))
    assert known.length == len(trace.tokens) > 512
    for layer in (1, 6, 18):
        taken, computed = trace.source.residual(layer)[0], plain.residual(layer)[0]
        length = len(trace.tokens)
        apart = np.linalg.norm(np.asarray(taken - computed)[:length], axis=1)
        assert (apart <= 1.7e-5 * np.linalg.norm(np.asarray(computed)[:length], axis=1)).all()
