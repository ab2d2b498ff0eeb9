"""First mistakes, of users of numpy and TransformerLens: each is told what to do, or just works."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb

IDS = [70, 71, 72, 73]


@pytest.fixture(scope="module")
def chat(tiny_model: Any) -> gnb.ChatSession:
    return gnb.ChatSession(*tiny_model, cache_length=64, template="none")


@pytest.fixture(scope="module")
def trace(tiny_model: Any) -> gnb.Trace:
    return gnb.trace(tiny_model[0], IDS, tokenizer=tiny_model[1])


MISTAKES = [
    ("model('Hello')", "tokens must be token ids, got a text: .*gnb.trace"),
    ("model(['Hello', 'World'])", "tokens must be token ids, got a list of texts"),
    ("model(np.array([[1.0, 2.0]]))", r"tokens must be whole numbers, got float64 \(1, 2\)"),
    ("model([[1, 2], [3]])", "tokens must be rows of one length"),
    ("model(tokenizer)", "tokens must be token ids, got a Tokenizer"),
    ("gnb.GemmaInputs.from_basic_segments('Hello')", "tokens must be token ids, got a text"),
    ("gnb.GemmaInputs.from_packed_segments([1, 2], [0.5, 1])", "segments must be whole numbers"),
    ("model.run_with_cache('Hello')", "has no attribute 'run_with_cache': gnb.trace"),
    ("model.to_tokens('Hello')", "tokenizer.encode"),
    ("model.generate('Hello')", "gnb.ChatSession"),
    ("model.add_hook", "model.intervene"),
    ("model.cfg", "model.config"),
    ("model.nothing", "has no attribute 'nothing'$"),
    ("trace['blocks.0.hook_resid_pre']", "'residual_pre' here: trace.get.*layers=0"),
    ("trace['blocks.1.attn.hook_pattern']", "'attention' here: .*layers=1"),
    ("trace.get('hook_resid_post')", "'residual' here"),
    (
        "trace.get('resid')",
        r"the sites are embed, residual_pre \(resid_pre\), .*residual \(resid_post\)",
    ),
    ("trace[0]", "a capture site is a name"),
    ("trace.get('residual', layers='0')", "layers must be"),
    ("trace.get('residual', positions=[1.5])", "positions must be"),
    ("trace.get('attention', heads='1')", "heads must be"),
    ("chat('hi')", r"chat.chat\(text\)"),
    ("chat.sample('hi', '3')", "n must be a whole number"),
    ("gnb.trace(tokenizer, 'Hello')", "model must be a GemmaTransformer, got a Tokenizer"),
    ("gnb.trace('Hello', model)", "model must be a GemmaTransformer, got a text"),
    ("gnb.trace(model, 'Hello', tokenizer='gemma')", "tokenizer must be a Tokenizer, got a text"),
    ("gnb.trace(model, ['a', 'b'], tokenizer=tokenizer)", "tokens_or_text .* a list of texts"),
    ("gnb.trace(model, np.ones((2, 3), int))", "tokens_or_text .*one by one"),
    ("gnb.trace(model, np.array([3.0]))", "tokens_or_text must be whole numbers, got float64"),
    ("gnb.ChatSession(tokenizer, model)", "model must be a GemmaTransformer, got a Tokenizer"),
    ("gnb.ChatSession(model, 'gemma')", "tokenizer must be a Tokenizer, got a text"),
    ("gnb.logit_lens(model)", "trace must be a Trace, got a GemmaTransformer: gnb.trace"),
    ("gnb.logit_lens(trace, '5')", "k must be a whole number"),
    ("gnb.top_activations(model, ['a'], tokenizer, 1, 3)", "tokenizer must be a Tokenizer"),
    ("gnb.activation_patching('a', 'b', model, gnb.Logit(3))", "model must be a GemmaTransformer"),
    ("gnb.Steer('1', np.ones(32))", "layer must be"),
    ("gnb.Steer(1, 'love')", "vector must be numbers, got a text"),
    ("gnb.EditNeuron(0, 3, 'a')", "value must be numbers, got a text"),
    ("model.intervene([gnb.Steer(1, np.ones(32))])", r"one by one: intervene\(\*interventions\)"),
    ("pickle.dumps(chat)", r"chat.save\(path\)"),
    ("copy.deepcopy(chat)", r"ChatSession.load\(path"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=lambda x: x[:40])
def test_a_first_mistake_is_told_what_to_do(
    tiny_model: Any, chat: Any, trace: Any, call: str, message: str
) -> None:
    model, tokenizer = tiny_model
    names = {"model": model, "tokenizer": tokenizer, "chat": chat, "trace": trace}
    with pytest.raises((TypeError, ValueError, AttributeError), match=message) as raised:
        eval(call, {**globals(), **names})
    assert "\n" not in str(raised.value)


def test_what_can_be_meant_in_one_way_works(tiny_model: Any) -> None:
    model, _ = tiny_model
    expected = model(gnb.GemmaInputs(np.array(IDS))).values
    for tokens in (IDS, tuple(IDS), np.array(IDS), np.array(IDS, np.uint8), jnp.array(IDS)):
        np.testing.assert_array_equal(model(tokens).values, expected)
    assert gnb.trace(model, np.array([IDS])).tokens.tolist() == IDS


def test_models_and_traces_are_pickled_and_copied(tiny_model: Any, trace: gnb.Trace) -> None:
    model = tiny_model[0].intervene(gnb.Steer(1, np.ones(32)), gnb.AblateHeads({0: [1]}))
    for other in (pickle.loads(pickle.dumps(model)), copy.copy(model), copy.deepcopy(model)):
        assert other.config == model.config
        assert repr(other) == repr(model)
        pairs = zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    copied = copy.deepcopy(trace)
    np.testing.assert_array_equal(copied.get("residual", 1), trace.get("residual", 1))
    assert pickle.loads(pickle.dumps(trace)).tokens.tolist() == IDS


def test_reprs_hold_no_arrays(tiny_model: Any, trace: gnb.Trace) -> None:
    model, _ = tiny_model
    many = np.zeros((1000, 64), np.float32)
    shapes = ((64, 1000), 1000, (1000, 64), 64, 1000)
    sae = gnb.SparseAutoencoder(*map(jnp.zeros, shapes), layer=3)
    things: list[Any] = [
        *(model, trace, sae, gnb.GemmaInputs(many), gnb.Sampling(forbidden=range(1000))),
        *(trace.labels_of, gnb.LogitDifference(jnp.int32(4), 5)),
        gnb.Patch("residual", 1, range(900), many[:900]),
        model.transformer.apply({"params": model.params}, jnp.array([IDS])),
    ]
    for thing in things:
        assert len(repr(thing)) < 1000, repr(thing)[:100]
        assert "\n" not in repr(thing)
    assert repr(gnb.GemmaInputs(many)).startswith("GemmaInputs(tokens=float32 (1000, 64)")
    assert "forbidden=(0, 1, 2, 3, 4, 5, ... 1000 in all)" in repr(things[4])
