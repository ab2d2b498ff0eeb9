"""Places of the weights of a released model: a package, the caches of the hubs, or the hubs.

Caches are read without the hubs' own libraries, in the layouts that these write:

    Hugging Face   <cache>/models--google--gemma-3-1b-it/refs/main           the commit of "main"
                   <cache>/models--google--gemma-3-1b-it/snapshots/<commit>  links to the files
    Kaggle         <cache>/models/google/gemma-3/flax/gemma3-1b-it/1          version 1
                   <cache>/models/google/gemma-3/flax/gemma3-1b-it/1.complete it is whole

Sources: huggingface_hub's "Understand caching" guide; kagglehub's `cache.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from gemma_nb.cache import expanded
from gemma_nb.checkpoints import catalog, spellings
from gemma_nb.checkpoints.catalog import Package
from gemma_nb.errors import CheckpointError, ModelNotInstalledError
from gemma_nb.presets import ModelInfo

# What of a repository is downloaded: some hold the same weights in other formats as well.
PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
_OFF = ("", "0", "off", "false", "no")
# What nothing outside of a cache can be reached by.  A branch may be called "refs/pr/1".
_NAME = r"\w[\w.+-]*"
_COMMIT, _REVISION = _NAME, f"{_NAME}(/{_NAME})*"


def locate(name: str, revision: str | None = None) -> Package | Path:
    """A released model's package where that is installed, or the folder of its checkpoint.

    Looks for an installed package, then in the local caches of Hugging Face and Kaggle; then
    downloads with `huggingface_hub` or `kagglehub`, whichever is installed.  A model that a package
    ships is not downloaded from elsewhere: a package asks for no account.

    Args:
      name: see `gnb.list_models()`.
      revision: a branch, tag or commit at Hugging Face, or the number of a version at Kaggle;
        packages have none.

    Raises:
      ModelNotInstalledError: the weights are not here and could not be downloaded; the message
        says what to accept, what to run and where to put the files.
      CheckpointError: no released model.
      ValueError: nothing that could be a revision.
    """
    if revision is not None and not re.fullmatch(_REVISION, revision):
        raise ValueError(
            f"expected a branch, a tag, a commit or the number of a version as revision, got "
            f"{revision!r}"
        )
    package = catalog.PACKAGES.get(name)
    if package is not None and package.installed and revision is None:
        return package
    check_name(name)
    info = catalog.MODELS[name]
    cached = find(info, revision)
    if cached is None and package is not None and revision is None:
        return package  # whose `locate` gives the command that installs it
    return cached or _download(info, revision)


def find(info: ModelInfo, revision: str | None = None) -> Path | None:
    """The folder of a whole checkpoint in a local cache; None if there is none."""
    found = None
    if info.hugging_face:
        found = _in_hugging_face_cache(info.hugging_face, revision)
    if found is None and info.kaggle:
        found = _in_kaggle_cache(info.kaggle, revision)
    return found


# --- caches ---------------------------------------------------------------------------------------


def hugging_face_cache() -> Path:
    """The folder of what huggingface_hub downloads, by the variables that it reads."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return _expanded(given)
    home = os.environ.get("HF_HOME")
    if home:
        return _expanded(home) / "hub"
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def kaggle_cache() -> Path:
    """The folder of what kagglehub downloads."""
    return _expanded(os.environ.get("KAGGLEHUB_CACHE") or "~/.cache/kagglehub")


def _expanded(path: str) -> Path:
    return expanded(os.path.expandvars(path))


def _in_hugging_face_cache(repo: str, revision: str | None) -> Path | None:
    home = hugging_face_cache() / f"models--{repo.replace('/', '--')}"
    commit = revision or "main"
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is no text
        commit = (home / "refs" / commit).read_text(encoding="ascii").strip()
    if not re.fullmatch(_COMMIT, commit):
        return None
    folder = home / "snapshots" / commit
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    """True where a snapshot has a configuration and every file of its weights.

    A download that was cut off leaves some files out; a cleaned cache leaves links to nothing.
    """
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return bool(names) and all((folder / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def _in_kaggle_cache(handle: str, revision: str | None) -> Path | None:
    owner, model, framework, variation = handle.split("/")
    # The framework is a folder under the spelling that was asked for: "flax" or "Flax".
    for home in sorted((kaggle_cache() / "models" / owner / model).glob("*")):
        if home.name.lower() != framework.lower():
            continue
        markers = (home / variation).glob("*.complete")
        whole = {int(m.stem): m.with_suffix("") for m in markers if m.stem.isdigit()}
        versions = [int(revision)] if revision and revision.isdigit() else sorted(whole)[-1:]
        if revision and not revision.isdigit():
            continue
        for version in versions:
            if version in whole and whole[version].is_dir():
                return whole[version]
    return None


# --- downloads ------------------------------------------------------------------------------------


def _download(info: ModelInfo, revision: str | None) -> Path:
    reasons = []
    numbered = revision is None or revision.isdigit()
    attempts: list[tuple[str, str, Callable[[str, str | None], str]]] = [
        ("huggingface_hub", info.hugging_face, _from_hugging_face),
        ("kagglehub", info.kaggle if numbered else "", _from_kaggle),
    ]
    for library, address, fetch in attempts:
        if not address:
            continue
        if not _installed(library):
            reasons.append(f"{library} is not installed")
        elif _offline():
            reasons.append(f"{library}: HF_HUB_OFFLINE says not to use the network")
        else:
            try:
                return Path(fetch(address, revision))
            except Exception as error:  # whatever the library, its transport and its network raise
                reasons.append(f"{library}: {_first_line(error)}")
    raise ModelNotInstalledError(how_to_get(info, reasons, revision))


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _from_hugging_face(repo: str, revision: str | None) -> str:
    import huggingface_hub

    folder = huggingface_hub.snapshot_download(
        repo, revision=revision, allow_patterns=list(PATTERNS)
    )
    return str(folder)


def _from_kaggle(handle: str, revision: str | None) -> str:
    import kagglehub

    folder = kagglehub.model_download(f"{handle}/{revision}" if revision else handle)
    return str(folder)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() not in _OFF


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def how_to_get(info: ModelInfo, reasons: list[str], revision: str | None = None) -> str:
    """A message of what to accept, what to run and where to put the files."""
    lines = [
        f"the weights of {info.name!r}" + (f" ({revision})" if revision else "") + " are not here"
    ]
    lines += [f"  ({reason})" for reason in reasons]
    package = catalog.PACKAGES.get(info.name)
    if package is not None:
        lines.append(f"  run: {package.install_command}")
    at = f" --revision {revision}" if revision else ""
    if info.hugging_face:
        lines += [
            f"  accept the terms at https://huggingface.co/{info.hugging_face}, then run:",
            '    pip install "gemma_nb[huggingface]" && hf auth login',
            f"    hf download {info.hugging_face}{at}",
            f"  which puts the files into {hugging_face_cache()}",
        ]
    if info.kaggle:
        page = info.kaggle.rpartition("/")[0]
        lines += [
            f"  or accept them at https://www.kaggle.com/models/{page}, then run:",
            '    pip install "gemma_nb[kaggle]"',
            '    python -c "import kagglehub; kagglehub.login(); '
            f"kagglehub.model_download('{info.kaggle}')\"",
            f"  which puts the files into {kaggle_cache()}",
        ]
    lines.append("  files from elsewhere: put them into any folder and pass its path to gnb.load")
    return "\n".join(lines)


def check_name(name: str) -> None:
    """Refuse what is no released model.

    Raises:
      CheckpointError: with what may be meant.
    """
    if name not in catalog.MODELS:
        raise CheckpointError(spellings.explained(name))
