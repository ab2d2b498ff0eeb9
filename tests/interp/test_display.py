"""Traces, interventions and models as treescope trees."""

import numpy as np
import treescope

import gemma_nb as gnb
from gemma_nb import structure
from gemma_nb.interp.display import Picture
from gemma_nb.structure import DrawnArray, ParamTree


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


def html_of(thing):
    return treescope.render_to_html(thing, compressed=False)


def test_weights_are_drawn_where_arrays_are_or_there_are_few(tiny_model, monkeypatch):
    model = tiny_model[0]
    assert "embedding: 32" in html_of(model)
    monkeypatch.setattr(structure, "_FEW", 10)
    assert "embedding: 32" not in html_of(model), "dozens of pictures that nobody asked for"
    with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
        drawn = html_of(model)
    for axis in ("vocabulary: 264", "embedding: 32", "head: 2", "head_dim: 16"):
        assert axis in drawn
    monkeypatch.setattr(structure, "_FEW", 13)
    layer = ParamTree(model.params["layer_0"], model.config, ("layer_0",))
    assert "head_dim: 16" in html_of(layer)
    text = treescope.render_to_text(layer)
    assert "float32 (head:2, embedding:32, head_dim:16)" in text


def test_what_has_no_numbers_is_a_line():
    bare = gnb.GemmaTransformer.from_config(gnb.presets.GEMMA3_270M)
    with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
        assert "not initialised" in treescope.render_to_text(bare)
    assert not DrawnArray.can_draw(np.zeros(1))


def test_interventions_are_a_tree_with_their_vectors(tiny_model):
    steered = tiny_model[0].intervene(
        gnb.Steer(1, np.arange(32.0), 2.0), gnb.AblateHeads({1: [0]}), start=3
    )
    text = treescope.render_to_text(steered)
    assert "steer residual of layer 1 by 2 times a vector" in text
    assert "vector=float32 (32)" in text
    assert "ablate heads 1.0 (zero) at all positions" in text
    assert "from position 3 on" in text
    assert "axis 0: 32" in html_of(steered.interventions)
