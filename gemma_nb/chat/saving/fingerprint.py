"""Fingerprints of models and tokenizers: which ones a conversation was held with."""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from typing import Any

import jax
import numpy as np

from gemma_nb import placement
from gemma_nb.model import GemmaTransformer
from gemma_nb.text.tokenizer import Tokenizer

_BLOCKS, _BLOCK = 16, 64  # numbers of each parameter that are looked at

# Of the models and tokenizers that are alive.
_weights: dict[int, str] = {}
_pieces: dict[int, str] = {}


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """A model and a tokenizer, by their content.

    Attributes:
      name: as in `gnb.load(name)`; "" for a model made by hand.
      title: for people.
      config: SHA-256 of the model's numbers.
      weights: SHA-256 of the parameters' names and shapes, and of 1,024 numbers of each, spread
        over it, as float32: it tells checkpoints and edits apart, but not where the weights lie,
        nor in which format they were stored.  Interventions count as parameters.
      tokenizer: SHA-256 of the vocabulary's pieces.
    """

    name: str
    title: str
    config: str
    weights: str
    tokenizer: str

    @classmethod
    def of(cls, model: GemmaTransformer, tokenizer: Tokenizer) -> Fingerprint:
        """The fingerprint of a loaded model and its tokenizer; fast, and computed once."""
        return cls(
            name=model.info.name if model.info else "",
            title=model.title if model.info or model.edits else "a Gemma model",
            config=_sha256(repr(model.config)),
            weights=_cached(_weights, model, _hash_weights),
            tokenizer=_cached(_pieces, tokenizer, _hash_pieces),
        )

    def differences(self, now: Fingerprint) -> list[str]:
        """Differences from the model and the tokenizer of `now`, in words."""
        words = []
        if self.config != now.config:
            words.append("another architecture")
        if self.weights != now.weights:
            words.append("other weights")
        if self.tokenizer != now.tokenizer:
            words.append("another tokenizer")
        return words

    def beside(self, other: Fingerprint) -> Fingerprint:
        """The fingerprint of a conversation that two models held in part: it is neither's."""
        return dataclasses.replace(
            self, name="", title=f"{self.title} and {other.title}", weights="several"
        )


def _cached(known: dict[int, str], of: Any, compute: Any) -> str:
    key = id(of)
    if key not in known:
        known[key] = compute(of)
        weakref.finalize(of, known.pop, key, None)
    return known[key]


def _sha256(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _hash_pieces(tokenizer: Tokenizer) -> str:
    return _sha256(*tokenizer.pieces(range(tokenizer.vocab_size)))


def _hash_weights(model: GemmaTransformer) -> str:
    parts: list[str | bytes] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        parts.append(f"{jax.tree_util.keystr(path)} {np.shape(leaf)}")
        parts.append(_sample(leaf).astype("<f4").tobytes())
    if model.interventions is not None:
        parts += model.interventions.describe()  # what of them is no array
    return _sha256(*parts)


def _sample(leaf: Any) -> np.ndarray:
    """Some numbers of an array.  Of weights that are mapped into memory, few pages are read."""
    size = int(np.prod(np.shape(leaf), dtype=np.int64))
    if size <= _BLOCKS * _BLOCK:
        index = np.arange(size)
    else:
        starts = np.linspace(0, size - _BLOCK, _BLOCKS).astype(np.int64)
        index = (starts[:, None] + np.arange(_BLOCK)).ravel()
    if _on_host(leaf):
        return np.asarray(leaf).reshape(-1)[index]
    return np.asarray(placement.fetch(leaf[np.unravel_index(index, leaf.shape)]))


def _on_host(leaf: Any) -> bool:
    """Whether numpy can look at an array without a copy of it."""
    if not isinstance(leaf, jax.Array):
        return True
    return len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"
