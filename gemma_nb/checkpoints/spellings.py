"""Released models as other places spell them: what is meant, or what may be.

    google/gemma-3-1b-it                              Hugging Face, also as an address
    google/gemma-3/flax/gemma3-1b-it/1                Kaggle, also as an address
    Gemma 3 1B, GEMMA3_1B                             by hand
    gemma3:1b-it-q4_K_M                               Ollama: other numbers under that name
    unsloth/gemma-3-1b-it-GGUF                        somebody else's copy

What is exactly the released model is loaded.  Of what is a copy, quantised or tuned further, it is
said which released model it comes from.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping

from gemma_nb.checkpoints import catalog

_HUGGING_FACE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+))?.*"
)
_KAGGLE = re.compile(
    r"(?:https?://)?(?:www\.)?kaggle\.com/models/"
    r"(?P<owner>[^/?#]+)/(?P<model>[^/?#]+)(?:/frameworks)?/(?P<framework>[^/?#]+)"
    r"(?:/variations)?/(?P<variation>[^/?#]+)(?:/versions)?(?:/(?P<revision>\d+))?.*",
    re.I,
)
_HANDLE = re.compile(r"(?P<id>[^/]+/[^/]+/[^/]+/[^/]+)(?:/(?P<revision>\d+))?")
_OLLAMA = re.compile(
    r"(?:(?:https?://)?(?:www\.|registry\.)?ollama\.(?:com|ai)/(?:library/)?)?"
    r"(?P<model>[\w.-]*gemma[\w.-]*)(?::(?P<tag>[\w.-]+))?"
)
_SIZE = re.compile(r"(?:^|-)(e?\d+(?:\.\d+)?[bm])(?=-|$)")

# Families that are no text model of the three that are read, and what they are.
_UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"gemma-?3n", "Gemma 3n, whose layers are of another kind, is not supported yet"),
    (r"gemma-?4(?![\d.]*[bm])", "Gemma 4 is not supported yet"),
    (r"paligemma", "PaliGemma reads pictures through a model of its own, and is not supported"),
    (r"recurrentgemma", "RecurrentGemma is a recurrent network (Griffin), and is not supported"),
    (r"embeddinggemma", "EmbeddingGemma turns text into one vector and writes none: not supported"),
    (r"t5gemma", "T5Gemma is an encoder and a decoder, and is not supported"),
    (r"vaultgemma", "VaultGemma, trained with differential privacy, is not supported yet"),
    (r"diffusiongemma", "DiffusionGemma does not write from left to right: not supported"),
    (
        r"gemma-?scope",
        "Gemma Scope is a set of sparse autoencoders, not a model; load the model that they belong "
        "to, and them with gnb.SparseAutoencoder.load",
    ),
    (r"(?:med|shield)siglip|siglip", "SigLIP reads pictures, writes no text, and is not supported"),
)


def released(spelled: str) -> tuple[str, str | None] | None:
    """The name of the released model that is spelled so, and the revision that is asked for.

    None where it is none, or another copy of one.
    """
    if spelled in catalog.MODELS:
        return spelled, None
    if match := _HUGGING_FACE.fullmatch(spelled):
        revision = None if match["revision"] == "main" else match["revision"]
        name = _by_id().get(match["id"].lower())
        return (name, revision) if name else None
    if match := _KAGGLE.fullmatch(spelled):
        handle = "/".join(match[part] for part in ("owner", "model", "framework", "variation"))
        name = _by_id().get(handle.lower())
        return (name, match["revision"]) if name else None
    if (match := _HANDLE.fullmatch(spelled)) and match["id"].lower() in _by_id():
        return _by_id()[match["id"].lower()], match["revision"]
    own, _, revision = spelled.partition("@")
    found = _by_id().get(own.lower())
    if found is None and re.fullmatch(r"[\w. -]+", spelled):  # with a colon it is one of Ollama's
        found = _by_title().get(_plain(spelled))
    return (found, revision or None) if found else None


def looks_like_a_name(spelled: str) -> bool:
    """True where what is no path here is written as hubs write names, rather than as a path."""
    if re.match(
        r"[a-z]+://|(?:www\.)?(?:huggingface\.co|hf\.co|kaggle\.com|ollama\.com)/", spelled
    ):
        return True
    if spelled.startswith((".", "~", "/", "\\")) or spelled.endswith((".gguf", ".safetensors")):
        return False
    return "gemma" in spelled.lower() and bool(
        re.fullmatch(r"[\w.:@ -]+(/[\w.:@ -]+){0,4}", spelled)
    )


def explained(spelled: str) -> str:
    """A message about a name that is no released model's."""
    said = f"{spelled!r:.120} is neither a path nor a released model"
    plain = _plain(spelled.split("://")[-1])
    for pattern, what in _UNSUPPORTED:
        if re.search(pattern, plain):
            return f"{said}: {what}; gnb.list_models() shows what is"
    if found := _in_ollama(spelled):
        name, tag = found
        return (
            f"{said}: at Ollama it is a quantised {name}; do you mean gnb.load({name!r})?  To load "
            f"that very file, pass the path in the line FROM of: ollama show --modelfile {tag}"
        )
    if inside := _inside(plain):
        return (
            f"{said}: it is called like a copy of {inside}, or of something made from it; do you "
            f"mean gnb.load({inside!r})?  To load that very one, download its files and pass the "
            "path of their folder or of the GGUF file"
        )
    nearest = ", ".join(map(repr, _nearest(plain)))
    return f"{said}; the nearest are {nearest}; gnb.list_models() shows all"


# --- names ----------------------------------------------------------------------------------------


def _plain(spelled: str) -> str:
    """Small letters, with one hyphen where there is anything between words."""
    return re.sub(r"[^a-z0-9.]+", "-", spelled.lower()).strip("-.")


@functools.cache
def _by_id() -> Mapping[str, str]:
    """Names by their ids at Hugging Face and Kaggle, in small letters."""
    found = {}
    for info in catalog.MODELS.values():
        found.update({x.lower(): info.name for x in (info.hugging_face, info.kaggle) if x})
    return found


@functools.cache
def _by_title() -> Mapping[str, str]:
    """Names by what they are called without their owner, `_plain`."""
    found: dict[str, str] = {}
    for info in catalog.MODELS.values():
        own = info.hugging_face.rpartition("/")[2]
        titles = [info.name, own, own.removesuffix("-pt"), info.title]
        family = re.fullmatch(r"gemma([\d.]+)-(.+)", info.name)
        if family:
            titles.append(f"gemma-{family[1]}-{family[2]}")
        for title in map(_plain, titles):
            found.setdefault(title, info.name)
            if title.endswith("instruction-tuned"):
                for short in ("it", "instruct"):
                    found.setdefault(title.replace("instruction-tuned", short), info.name)
            elif info.tuning == "base":
                found.setdefault(f"{title.removesuffix('-pt')}-pt", info.name)
    return found


def _inside(plain: str) -> str | None:
    """The released model whose name, as some hub spells it, is the longest in this one."""
    found = [
        (len(title), name)
        for title, name in _by_title().items()
        if re.search(rf"(?:^|-){re.escape(title)}(?:-|$)", plain)
    ]
    return max(found)[1] if found else None


def _in_ollama(spelled: str) -> tuple[str, str] | None:
    """The released model that a tag at Ollama was made from, and the tag.

    Where a tag does not say whether it is tuned it is.
    """
    match = _OLLAMA.fullmatch(spelled.lower())
    if not match or (match["tag"] is None and "ollama." not in spelled):
        return None
    tag = match["tag"] or ""
    size = _SIZE.search(tag)
    if not size:
        return None
    model = {"gemma": "gemma1", "shieldgemma": "shieldgemma"}.get(match["model"], match["model"])
    base = re.search(r"(?:^|-)(?:text|pt|code)(?:-|$)", tag)
    names = (f"{model}-{size[1]}-it", f"{model}-{size[1]}")
    found = [name for name in (names[1:] if base else names) if name in catalog.MODELS]
    return (found[0], f"{match['model']}:{tag}") if found else None


def _nearest(plain: str) -> list[str]:
    """The three released models whose spellings are most like this one."""
    best: dict[str, float] = {}
    words = plain.replace("-", "")
    for title, name in _by_title().items():
        ratio = difflib.SequenceMatcher(None, words, title.replace("-", "")).ratio()
        best[name] = max(best.get(name, 0.0), ratio)
    return sorted(best, key=lambda name: -best[name])[:3]
