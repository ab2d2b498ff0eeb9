"""Traces, interventions and models as treescope trees."""

import numpy as np
import treescope

import gemma_nb as gnb
from gemma_nb.interp.display import Picture


def test_a_trace_is_a_tree_of_labelled_pictures(tiny_model):
    model, tokenizer = tiny_model
    model = model.intervene(gnb.AblateHeads({1: [0]}))
    trace = gnb.trace(model, "Hi you", tokenizer=tokenizer, sites=("attention", "embed"))
    text = treescope.render_to_text(trace)
    assert "attention=<float32 (layer:3, head:2, query:7, key:7)" in text
    assert "ablate heads 1.0 (zero) at all positions" in text
    bundle = trace._repr_mimebundle_()
    assert bundle["text/plain"] == repr(trace)
    # A picture of each, with its axes and tokens.
    assert "<" in bundle["text/html"]
    html = treescope.render_to_html(trace, compressed=False)
    for label in ("query: 7", "key: 7", "embedding: 32"):
        assert label in html
    assert len(html) < 2_000_000


def test_large_arrays_are_drawn_in_part(tiny_model):
    trace = gnb.trace(tiny_model[0], np.arange(10, 240), sites=("attention", "scores"))
    for name in ("attention", "scores"):
        html = treescope.render_to_html(Picture(trace[name]).figure())
        assert len(html) < 3_000_000


def test_models_list_their_interventions(tiny_model):
    model = tiny_model[0].intervene(gnb.Steer(1, np.ones(32), 2.0))
    assert "steer residual of layer 1 by 2 times a vector" in treescope.render_to_text(model)
    assert "steer residual" in repr(model)
    assert "interventions" not in treescope.render_to_text(tiny_model[0])
