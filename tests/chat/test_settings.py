"""Settings of a session as JSON and slips of the hand give them: taken, or refused by name."""

import re

import numpy as np
import pytest

import gemma_nb as gnb


def test_mappings_are_taken_as_json_has_them(tiny_model):
    chat = gnb.ChatSession(
        *tiny_model,
        sampling={"stop": None, "top_k": 3.0, "seed": 4, "max_new_tokens": 2},
        capture={"top_k": 4.0, "attention_layers": None},
        cache_length=np.int64(2048),
        template=None,
        when_full=None,
    )
    assert chat.sampling == gnb.Sampling(top_k=3, seed=4, max_new_tokens=2)
    assert (chat.capture, chat.cache_length) == (gnb.Capture(top_k=4), 2048)
    assert (chat.template.name, chat.when_full) == ("transcript", "stop")
    turn = chat.chat("Hello")
    assert {len(token.alternatives) for token in turn.tokens} == {4}
    again = chat.resume(turn, sampling={"temperature": 0, "max_new_tokens": 1})
    assert again.sampling.temperature == 0
    chat.sampling = {"temperature": 0.5}
    assert chat.sampling == gnb.Sampling(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": {"topk": 3}}, "sampling has no field 'topk' (do you mean 'top_k'?)"),
        ({"sampling": {"top_k": "3"}}, "top_k must be a whole number"),
        ({"sampling": "greedy"}, "sampling must be a gnb.Sampling or a mapping of its fields"),
        ({"capture": {"layers": "all"}}, "capture has no field 'layers'"),
        ({"capture": {"top_k": True}}, "Capture.top_k must be a whole number from 1 to 256"),
        ({"capture": {"attention_layers": "some"}}, 'Capture.attention_layers must be "all"'),
        ({"capture": {"attention_bytes": "1 GB"}}, "Capture.attention_bytes must be"),
        ({"cache_length": "64"}, "cache_length must be a whole number; got '64'"),
        ({"cache_length": 64.5}, "cache_length must be a whole number"),
        ({"system": ["Be brief."]}, "system must be a string or None"),
        ({"when_full": 3}, "when_full must be one of"),
        ({"template": 3}, "unknown template 3"),
        ({"autosave": True}, "autosave must be the path of a file, or None; got True"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(tiny_model, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gnb.ChatSession(*tiny_model, **settings)


def test_a_session_keeps_its_sampling_where_another_is_refused(tiny_model):
    chat = gnb.ChatSession(*tiny_model)
    before = chat.sampling
    for wrong in (None, 3, {"temperature": "hot"}):
        with pytest.raises(ValueError, match=r"sampling must be|temperature must be"):
            chat.sampling = wrong
    assert chat.sampling == before
