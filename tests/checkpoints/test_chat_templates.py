"""Where checkpoints keep their chat templates, as transformers 5.24 and llama.cpp look for them."""

import json

import pytest

from gemma_nb.checkpoints.chat_templates import of_folder, of_gguf
from gemma_nb.errors import CheckpointError
from gemma_nb.presets import ChatTemplates

NAMED = [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]


def folder(tmp_path, files):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("files", "sources"),
    [
        ({"tokenizer_config.json": {"chat_template": "A"}}, {"default": "A"}),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, {"default": "A", "rag": "B"}),
        ({"chat_template.json": {"chat_template": "A"}}, {"default": "A"}),
        (
            {
                "chat_template.jinja": "A",
                "additional_chat_templates/rag.jinja": "B",
                "tokenizer_config.json": {"chat_template": "C"},
            },
            {"default": "A", "rag": "B"},
        ),
    ],
)
def test_a_folder_has_them_in_files_or_fields(tmp_path, files, sources):
    assert dict(of_folder(folder(tmp_path, files)).sources) == sources


@pytest.mark.parametrize("field", [None, "", []])
def test_a_folder_without_any_has_none(tmp_path, field):
    assert of_folder(tmp_path) is None
    assert of_folder(folder(tmp_path, {"tokenizer_config.json": {"chat_template": field}})) is None


def test_special_tokens_come_along(tmp_path):
    config = {
        "chat_template": "A",
        "add_bos_token": False,
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "pad_token": None,
        "model_max_length": 8192,
    }
    tokens = {"eos_token": "<eos>", "bos_token": "<bos>"}
    files = {"tokenizer_config.json": config, "special_tokens_map.json": tokens}
    found = of_folder(folder(tmp_path, files))
    assert dict(found.tokens) == {"eos_token": "<|im_end|>", "bos_token": "<bos>"}
    assert found.add_bos is False


@pytest.mark.parametrize("field", [3, {"name": "default"}, ["A"], [{"name": "default"}]])
def test_what_is_no_template_is_refused(tmp_path, field):
    files = folder(tmp_path, {"tokenizer_config.json": {"chat_template": field}})
    with pytest.raises(CheckpointError, match=r'tokenizer_config\.json: expected "chat_template"'):
        of_folder(files)


def test_a_gguf_file_has_them_in_fields():
    fields = {"general.name": "x", "tokenizer.chat_templates": ["rag"]}
    assert of_gguf(fields) is None
    fields |= {"tokenizer.chat_template": "A", "tokenizer.chat_template.rag": "B"}
    assert of_gguf(fields) == ChatTemplates((("default", "A"), ("rag", "B")))
    assert of_gguf({**fields, "tokenizer.ggml.add_bos_token": False}).add_bos is False
