"""gm's `Sampler` and `ChatSampler` on our Transformer, beside gm's own module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import gemma_nb as gnb
from tests.contract import theirs

if TYPE_CHECKING:
    from gemma_nb.model import GemmaTransformer
    from gemma_nb.text.tokenizer import Tokenizer

PROMPTS = ["Hello", "A longer prompt, beyond the window.", "x"]


@pytest.fixture(scope="module")
def tiny(
    lively: tuple[GemmaTransformer, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> tuple[GemmaTransformer, Any]:
    """A model, and gm's tokenizer for it."""
    model, tokenizer = lively
    return model, theirs.tokenizer(tokenizer, tmp_path_factory.mktemp("vocabulary"))


def sampler(kind: str, module: Any, params: Any, tokenizer: Any, **settings: Any) -> Any:
    made = getattr(theirs.gm().text, kind)
    return made(model=module, params=params, tokenizer=tokenizer, **settings)


def pair(kind: str, tiny: tuple[GemmaTransformer, Any], **settings: Any) -> tuple[Any, Any]:
    """gm's sampler on our module, and on gm's."""
    model, tokenizer = tiny
    settings = {"cache_length": 512, "max_out_length": 48, **settings}
    modules = (model.transformer, theirs.module(model.config))
    ours, gms = (sampler(kind, m, model.params, tokenizer, **settings) for m in modules)
    return ours, gms


@pytest.mark.parametrize("prompt", ["Hello", PROMPTS])
@pytest.mark.parametrize("pad_length", [None, (64, 256)])
def test_sampler_draws_the_same_tokens(
    tiny: tuple[GemmaTransformer, Any], prompt: Any, pad_length: Any
) -> None:
    """Also for rows of different length, whose padding lies in the middle of the cache."""
    # A small random model repeats itself when greedy.
    drawn = {"sampling": theirs.gm().text.RandomSampling(temperature=1.0), "rng": 7}
    ours, gms = (
        s.sample(prompt, max_new_tokens=40, return_state=True, **drawn)
        for s in pair("Sampler", tiny, pad_length=pad_length)
    )
    np.testing.assert_array_equal(ours.tokens, gms.tokens)
    assert ours.text == gms.text
    assert len(set(np.asarray(ours.tokens).ravel().tolist())) > 4


def test_chat_sampler_keeps_the_same_conversation(tiny: tuple[GemmaTransformer, Any]) -> None:
    ours, gms = pair("ChatSampler", tiny, multi_turn=True)
    for message in ("Hello", "and then?"):
        assert ours.chat(message, max_new_tokens=12) == gms.chat(message, max_new_tokens=12)
    assert len(ours.turns) == len(gms.turns) == 4


@pytest.mark.real
def test_default_model_writes_the_same_text(tmp_path: Path) -> None:
    model, tokenizer = gnb.load("gemma3-270m", dtype="float32", progress=False)
    gms_tokenizer = theirs.tokenizer(tokenizer, tmp_path)
    texts = [
        sampler(
            "Sampler", module, model.params, gms_tokenizer, cache_length=256, pad_length=(32,)
        ).sample("The three largest cities of France are", max_new_tokens=24)
        for module in (model.transformer, theirs.module(model.config))
    ]
    print(texts[0])
    assert texts[0] == texts[1]
    assert "Paris" in texts[0]
