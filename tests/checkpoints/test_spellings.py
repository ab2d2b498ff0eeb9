"""Names as hubs and people spell them.

Ids are those of the models' pages at Hugging Face, Kaggle and Ollama.
"""

from __future__ import annotations

import pytest

from gemma_nb.checkpoints import catalog, hub, sources, spellings
from gemma_nb.errors import CheckpointError
from tests.checkpoints import written

URL = "https://huggingface.co/google/gemma-3-1b-it"
KAGGLE = "https://www.kaggle.com/models/google/gemma"


@pytest.mark.parametrize(
    ("spelled", "name", "revision"),
    [
        ("google/gemma-2-2b-it", "gemma2-2b-it", None),
        ("google/gemma-2b-it", "gemma1-2b-it", None),
        ("google/gemma-3-1b-pt", "gemma3-1b", None),
        ("Google/Gemma-3-1B-IT", "gemma3-1b-it", None),
        ("google/gemma-3-1b-it@v2", "gemma3-1b-it", "v2"),
        (URL, "gemma3-1b-it", None),
        (f"{URL}/tree/main", "gemma3-1b-it", None),
        (f"{URL}/blob/abc/config.json", "gemma3-1b-it", "abc"),
        ("hf.co/google/gemma-3-1b-it", "gemma3-1b-it", None),
        ("google/gemma/flax/2b-it", "gemma1-2b-it", None),
        ("google/gemma-3/Flax/gemma3-1b-it/2", "gemma3-1b-it", "2"),
        (f"{KAGGLE}-3/flax/gemma3-1b-it", "gemma3-1b-it", None),
        (f"{KAGGLE}/frameworks/flax/variations/2b-it/versions/3", "gemma1-2b-it", "3"),
        ("gemma-3-1b", "gemma3-1b", None),
        ("gemma-3-1b-pt", "gemma3-1b", None),
        ("gemma-1.1-2b-it", "gemma1.1-2b-it", None),
        ("GEMMA3_1B_IT", "gemma3-1b-it", None),
        ("Gemma 3 270M", "gemma3-270m", None),
        ("Gemma 3 270M instruct", "gemma3-270m-it", None),
        ("google/medgemma-4b-pt", "medgemma-4b", None),
    ],
)
def test_what_is_exactly_a_released_model_is_it(spelled, name, revision):
    assert spellings.released(spelled) == (name, revision)


@pytest.mark.parametrize("info", catalog.MODELS.values(), ids=lambda info: info.name)
def test_every_released_model_is_found_by_each_of_its_names(info):
    for spelled in (info.name, info.hugging_face, info.title, info.kaggle or info.name):
        assert spellings.released(spelled) == (info.name, None)


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        # What Ollama calls gemma2:2b is tuned, unlike what is called gemma2-2b here.
        ("gemma2:2b", r"a quantised gemma2-2b-it; do you mean gnb.load\('gemma2-2b-it'\)"),
        ("gemma3:1b-it-q4_K_M", "quantised gemma3-1b-it; .* --modelfile gemma3:1b-it-q4_k_m$"),
        ("gemma:7b-text", "a quantised gemma1-7b;"),
        ("https://ollama.com/library/gemma3:4b", "quantised gemma3-4b-it; .*file gemma3:4b$"),
        ("unsloth/gemma-3-270m-it", "a copy of gemma3-270m-it, .* path of their folder"),
        ("bartowski/google_gemma-3-1b-it-GGUF", r"mean gnb.load\('gemma3-1b-it'\)"),
        ("hf.co/unsloth/gemma-3-1b-it-GGUF:Q4_K_M", r"mean gnb.load\('gemma3-1b-it'\)"),
        ("models/gemma-3-27b-it", r"mean gnb.load\('gemma3-27b-it'\)"),
        ("google/gemma-3/transformers/gemma-3-1b-it", r"mean gnb.load\('gemma3-1b-it'\)"),
        ("google/gemma-3n-E2B-it", "Gemma 3n, .* not supported yet; gnb.list_models"),
        ("gemma3n:e4b", "Gemma 3n, .* not supported yet"),
        ("google/gemma-4-31b-it", "Gemma 4 is not supported yet"),
        ("gemma4", "Gemma 4 is not supported yet"),
        ("google/paligemma2-3b-pt-224", "PaliGemma reads pictures"),
        ("google/recurrentgemma-2b", "RecurrentGemma is a recurrent network"),
        ("google/embeddinggemma-300m", "EmbeddingGemma turns text into one vector"),
        ("google/t5gemma-2b-2b-ul2", "T5Gemma is an encoder and a decoder"),
        ("google/gemma-scope-2b-pt-res", "sparse autoencoders, .*SparseAutoencoder.load"),
        ("gemma-4b-it", "the nearest are 'gemma3-4b-it', '[^']*', '[^']*'; gnb.list_models"),
        ("gemma3-27", "the nearest are 'gemma3-27b', '[^']*', '[^']*'; gnb.list_models"),
    ],
)
def test_of_another_name_it_is_said_what_it_is_or_may_be(spelled, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert spellings.released(spelled) is None
    with pytest.raises(CheckpointError, match=said):
        sources.resolve(spelled)


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    """As transformers takes `google/gemma-3-1b-it` where there is such a folder."""
    monkeypatch.chdir(tmp_path)
    asked = []
    folder = written.hugging_face(tmp_path / "x", written.params())

    def locate(name, revision=None):
        asked.append((name, revision))
        return folder

    monkeypatch.setattr(hub, "locate", locate)
    assert sources.resolve(f"{URL}/tree/abc").files == (folder,)
    with pytest.raises(ValueError, match="expected revision=None or 'abc'"):
        sources.resolve(f"{URL}/tree/abc", revision="main")
    assert asked == [("gemma3-1b-it", "abc")]
    mine = written.hugging_face(tmp_path / "google" / "gemma-3-1b-it", written.params())
    assert str(sources.resolve("google/gemma-3-1b-it").files[0].absolute()) == str(mine)


def test_a_path_that_is_not_there_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "gemma-mine").mkdir()
    for spelled in ("runs/gemma-mines", "./gemma-3", "runs/gemma.gguf", "/gemma-3-1b-it"):
        with pytest.raises(CheckpointError, match="there is no such file"):
            sources.resolve(spelled)
    with pytest.raises(CheckpointError, match="no such file, but gemma-mine beside it"):
        sources.resolve("runs/gemma-mines")
