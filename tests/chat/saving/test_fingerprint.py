"""A conversation under another model than it was saved with."""

import jax
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.chat.saving.fingerprint import Fingerprint
from gemma_nb.errors import ModelMismatchError
from tests.chat.checks import assert_same


@pytest.fixture(scope="module")
def other_model(tiny_model):
    model, _ = tiny_model
    return gnb.GemmaTransformer.from_config(model.config, key=jax.random.key(1))


def test_another_model_is_refused_and_the_ways_out_named(saved, other_model, tiny_model):
    with pytest.raises(ModelMismatchError, match=r"other weights.*recompute=True.*recompute=False"):
        gnb.ChatSession.load(saved, other_model, tiny_model[1])


def test_an_edited_model_is_another_one(saved, tiny_model):
    model, tokenizer = tiny_model
    edited = model.edit("layer_1/mlp/linear", lambda w: 0.9 * w)
    with pytest.raises(ModelMismatchError, match="other weights"):
        gnb.ChatSession.load(saved, edited, tokenizer)


def test_the_same_weights_are_the_same_model_wherever_they_are(tiny_model):
    model, tokenizer = tiny_model
    copied = model.replace(params=jax.tree.map(lambda x: x.copy(), model.params))
    assert Fingerprint.of(copied, tokenizer) == Fingerprint.of(model, tokenizer)
    assert Fingerprint.of(model.place("auto"), tokenizer) == Fingerprint.of(model, tokenizer)


def test_recomputed_evidence_is_that_of_the_new_model(grown, saved, other_model, tiny_model):
    tokenizer = tiny_model[1]
    reports = []
    loaded = gnb.ChatSession.load(
        saved, other_model, tokenizer, recompute=True, progress=lambda *r: reports.append(r)
    )
    assert len(reports) > 3
    assert reports[-1][0] == 1
    assert [turn.text for turn in loaded.tree] == [turn.text for turn in grown.tree]
    run = jax.jit(other_model.transformer.apply)
    for turn, old in zip(loaded.tree, grown.tree, strict=True):
        if turn.role == "user":
            assert turn == old
            continue
        ids = loaded.tokens(turn)
        logits = run({"params": other_model.params}, np.array([ids + [0] * (100 - len(ids))]))
        expected = jax.nn.log_softmax(logits.logits[0])
        assert [r.token_id for r in turn.tokens] == [r.token_id for r in old.tokens]
        assert [r.text for r in turn.tokens] == [r.text for r in old.tokens]
        for record in turn.tokens:
            row = expected[record.position - 1]
            assert record.logprob == pytest.approx(float(row[record.token_id]), abs=2e-5)
            assert record.alternatives[0].token_id == int(row.argmax())
    # What is saved now is this model's.
    again = gnb.ChatSession.load(loaded.save(saved), other_model, tokenizer)
    assert_same(loaded, again)


def test_kept_evidence_stays_the_other_models(grown, saved, other_model, tiny_model):
    model, tokenizer = tiny_model
    loaded = gnb.ChatSession.load(saved, other_model, tokenizer, recompute=False)
    assert_same(grown, loaded)
    loaded.chat("Go on")
    path = loaded.save(saved)
    # Now it is neither's.
    for either in (model, other_model):
        with pytest.raises(ModelMismatchError, match="other weights"):
            gnb.ChatSession.load(path, either, tokenizer)
    gnb.ChatSession.load(path, model, tokenizer, recompute=True)


def test_another_tokenizer_spells_the_replies_anew(grown, saved, tiny_model, other_tokenizer):
    model, _ = tiny_model
    for keep in (None, False):
        with pytest.raises(ModelMismatchError, match="another tokenizer") as caught:
            gnb.ChatSession.load(saved, model, other_tokenizer, recompute=keep)
        assert "recompute=False" not in str(caught.value)
    loaded = gnb.ChatSession.load(saved, model, other_tokenizer, recompute=True)
    assert [turn.text for turn in loaded.tree] == [turn.text for turn in grown.tree]
    for turn in loaded.tree:
        if turn.role == "model":
            assert "".join(record.text for record in turn.tokens) == turn.text
            assert other_tokenizer.decode(turn.ids) == turn.text
            assert loaded.tokens(turn)[turn.tokens[0].position] == turn.tokens[0].token_id
    loaded.chat("Go on")


@pytest.fixture(scope="module")
def other_tokenizer(tiny_tokenizer):
    """The same pieces in another order."""
    from sentencepiece import sentencepiece_model_pb2

    from gemma_nb.text.tokenizer import Tokenizer

    proto = sentencepiece_model_pb2.ModelProto.FromString(tiny_tokenizer.model_proto)
    first, second = proto.pieces[-2].piece, proto.pieces[-1].piece
    proto.pieces[-2].piece, proto.pieces[-1].piece = second, first
    return Tokenizer.from_bytes(proto.SerializeToString())


def test_an_intervention_makes_another_model(saved, tiny_model):
    model, tokenizer = tiny_model
    first, second = (model.intervene(gnb.AblateHeads({0: [head]})) for head in (0, 1))
    with pytest.raises(ModelMismatchError, match="other weights"):
        gnb.ChatSession.load(saved, first, tokenizer)
    assert Fingerprint.of(first, tokenizer) != Fingerprint.of(second, tokenizer)
