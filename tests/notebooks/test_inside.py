"""The notebooks on looking inside: they run, and what their prose says is so."""

from __future__ import annotations

import re

import numpy as np
import pytest

import gemma_nb as gnb
from tests.notebooks.test_notebooks import REPO, complaints, execute, printed, shown

pytestmark = pytest.mark.real

# Cells that show a figure.
FIGURES = {
    "02_tokens_and_logits": ("reply", "entropy", "surprise"),
    "03_attention": ("head", "grid", "lines", "turns", "statistics", "induction", "values"),
    "04_logit_lens_and_interventions": (
        *("lens", "watch", "curves", "attribution", "patching", "told"),
    ),
}


@pytest.fixture(scope="module", params=FIGURES)
def ran(request):
    """(name, outputs by cell id) of each notebook."""
    return request.param, execute(REPO / "notebooks" / f"{request.param}.ipynb")


def test_no_cell_complains_and_every_figure_is_shown(ran):
    name, outputs = ran
    assert complaints(outputs) == []
    for cell in FIGURES[name]:
        assert len(shown(outputs[cell])["image/png"]) > 10_000, cell


def test_printed_numbers_are_what_the_prose_says(ran):
    """One fact of each notebook that its text builds on."""
    name, outputs = ran
    if name.startswith("02"):
        assert "which add up to 1.000000" in printed(outputs["logits"])
        rest = [
            float(x) for x in re.findall(r"all others ([\d.]+)", printed(outputs["temperature"]))
        ]
        assert rest == sorted(rest)  # a higher temperature favours the unlikely
        assert "<0x" in printed(outputs["pieces"])
    elif name.startswith("03"):
        assert printed(outputs["import"]) == "The capital of France is Paris.\n"
    else:
        text = printed(outputs["ablation"])
        head = int(re.search(r"most induction: layer \d+, head (\d+)", text).group(1))
        changes = dict(re.findall(r"without head (\d+) of layer \d+: ([+-][\d.]+)", text))
        loss = {int(h): float(change) for h, change in changes.items()}
        assert max(loss, key=loss.get) == head
        assert loss[head] > 0


def test_surprise_is_where_the_word_is_odd(real_model):
    model, tokenizer = real_model
    text = "The cat sat on the mat and fell asleep. The cat sat on the theorem and fell asleep."
    statistics = gnb.token_statistics(gnb.trace(model, text, tokenizer=tokenizer, sites=()))
    second = statistics.isel(position=slice(statistics.sizes["position"] // 2, None))
    assert str(second.token.values[second.logprob.values.argmin()]) == " theorem"
    # What was read once is easier to guess.
    first = statistics.logprob.isel(position=slice(2, 10)).mean()
    assert second.logprob.isel(position=slice(1, 5)).mean() > first


def test_induction_head_looks_behind_the_first_occurrence(real_model):
    model, tokenizer = real_model
    scores = gnb.head_scores(model)
    layer, head = (int(i[0]) for i in (scores.induction == scores.induction.max()).values.nonzero())
    text = "red seven moon garden paper quick violin stone river"
    trace = gnb.trace(model, f"{text} {text}", tokenizer=tokenizer)
    weights = trace.get("attention", layers=layer, heads=head).values[0, 0]
    ids = trace.tokens.tolist()
    behind = [
        weights[q, ids.index(ids[q]) + 1] for q in range(len(ids)) if ids.index(ids[q]) + 1 < q
    ]
    assert np.mean(behind) > 0.3


def test_answer_moves_to_the_last_position(real_model):
    """What the picture of the patching sweep is said to show."""
    model, tokenizer = real_model
    text = "The capital of Italy is Rome. The capital of France is"
    paris, tokyo = (tokenizer.encode(word)[0] for word in (" Paris", " Tokyo"))
    sweep = gnb.activation_patching(
        model,
        text,
        text.replace("France", "Japan"),
        gnb.LogitDifference(paris, tokyo),
        tokenizer=tokenizer,
        progress=False,
    )
    clean, corrupted = sweep.attrs["clean"], sweep.attrs["corrupted"]
    assert clean > 0 > corrupted
    part = (sweep - corrupted) / (clean - corrupted)
    country = part.position[sweep.token.values != sweep.clean_token.values].item()
    assert part.sel(layer=0, position=country) > 0.9
    assert part.sel(layer=17, position=country) < 0.1
    assert part.sel(layer=17, position=part.position[-1]) > 0.9
    lens = gnb.logit_lens(gnb.trace(model, text, tokenizer=tokenizer, sites=()), k=1)
    assert str(lens.token.values[-1, -1, 0]) == " Paris"
