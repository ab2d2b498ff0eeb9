"""What is said where something else is given than what is expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# What users of other libraries call on a model, and what does it here.
_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(
        ("run_with_cache", "cache", "get_activations"),
        "gnb.trace(model, text, tokenizer=tokenizer) computes what happens inside",
    ),
    **dict.fromkeys(
        ("hooks", "run_with_hooks", "add_hook", "add_perma_hook", "register_forward_hook"),
        "model.intervene(gnb.Steer(...), gnb.Patch(...)) gives a model that computes differently",
    ),
    **dict.fromkeys(
        ("reset_hooks", "remove_all_hooks"),
        "a model never changes, and model.intervene() gives it without interventions",
    ),
    **dict.fromkeys(
        ("to_tokens", "to_str_tokens", "encode"),
        "tokenizer.encode(text, bos=True) gives token ids, and tokenizer.token_text(id) their text",
    ),
    **dict.fromkeys(
        ("to_string", "to_single_token", "to_single_str_token", "decode"),
        "tokenizer.decode(ids) gives a text",
    ),
    "tokenizer": "it comes with the model: model, tokenizer = gnb.load(...)",
    **dict.fromkeys(
        ("generate", "chat", "sample"),
        "gnb.ChatSession(model, tokenizer).chat(text) gives a reply",
    ),
    **dict.fromkeys(
        ("forward", "apply", "logits"),
        "model(gnb.GemmaInputs(tokens)) gives logits, and "
        'model.transformer.apply({"params": model.params}, tokens) is the module itself',
    ),
    "cfg": "model.config holds its numbers",
    **dict.fromkeys(
        ("W_E", "W_U", "embed", "unembed"),
        'model.params["embedder"]["input_embedding"] is both, (vocabulary, embedding)',
    ),
    **dict.fromkeys(
        (
            *("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "blocks", "layers", "model"),
            *("state_dict", "parameters", "named_parameters"),
        ),
        'model.params["layer_0"] and so on hold its arrays: show model in a notebook',
    ),
    **dict.fromkeys(
        ("to", "cuda", "cpu", "eval", "train", "half", "float", "bfloat16", "requires_grad_"),
        "there is nothing to switch: JAX places arrays itself (mesh= spreads them), and "
        "gnb.load(dtype=...) chooses their type",
    ),
}


def elsewhere(name: str) -> str:
    """What does here what `name` of a model does in other libraries; "" where nothing is known."""
    return _ELSEWHERE.get(name, "")


def a(value: Any) -> str:
    """What a value is, in a word or two: "a text", "a Tokenizer", "an int"."""
    name = "text" if isinstance(value, str) else type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def expect(value: Any, kind: type, argument: str, way: str) -> None:
    """Raises TypeError where an argument is of another kind; `way` says what to do."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument} must be a {kind.__name__}, got {a(value)}: {way}")


def token_array(given: Any, argument: str, way: str) -> np.ndarray:
    """Token ids as numpy's, of any number of axes.

    Args:
      given: a list or an array.
      argument: its name.
      way: how a text becomes ids.

    Raises:
      TypeError: a text, or something else that holds no numbers.
      ValueError: numbers that are no whole ones, or rows of different lengths.
    """
    if isinstance(given, str) or (
        isinstance(given, list | tuple) and any(isinstance(x, str) for x in given)
    ):
        what = "a text" if isinstance(given, str) else "a list of texts"
        raise TypeError(f"{argument} must be token ids, got {what}: {way}")
    try:
        found = np.asarray(given)
    except ValueError:
        raise ValueError(
            f"{argument} must be rows of one length, got {given!r:.60}: pad them, or give one text "
            "at a time"
        ) from None
    if found.dtype.kind == "f" and found.size:
        raise ValueError(
            f"{argument} must be whole numbers, got {found.dtype} {found.shape}: "
            "ids.astype(int) makes them so"
        )
    if found.dtype.kind not in "iu" and found.size:
        raise TypeError(f"{argument} must be token ids, got {a(given)}: {way}")
    return found
