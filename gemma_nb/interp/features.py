"""Top activations of neurons and learned features in the user's own texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_nb import indices
from gemma_nb.executables import pinned
from gemma_nb.expected import expect
from gemma_nb.indices import one
from gemma_nb.interp.trace import Trace, trace
from gemma_nb.interventions.base import lines_of
from gemma_nb.model import GemmaTransformer
from gemma_nb.sites import check_layer, site_of
from gemma_nb.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xarray

_CONTEXT = 12  # tokens shown before an activating token, and half as many behind it


@pinned
def top_activations(
    model: GemmaTransformer,
    tokenizer: Tokenizer,
    texts: Iterable[Any],
    layer: int,
    neuron: int,
    k: int = 10,
    *,
    site: str = "mlp_hidden",
    include_first: bool = False,
) -> xarray.Dataset:
    """The tokens of some texts at which a neuron is most active.

    The first position of a text, and <bos> wherever it stands, are left out, as SAELens and
    Neuronpedia do: its residual stream is many times as long as others', the same in every text,
    and would be most active for almost everything.  A text that is given twice counts once.  Of
    equal activations the earlier text comes first, and the earlier position in it.

    What it does not mean: the strongest examples are not the typical ones, and these texts are not
    all texts; many neurons respond to several unrelated things (arXiv:2209.10652).

    Args:
      model: whose neuron.
      tokenizer: of the model.
      texts: where to look, each a text or a list of token ids.
      layer: the neuron's.
      neuron: its index along the site's last axis.
      k: how many tokens, at most.
      site: mlp_hidden for neurons; any site of one vector per position.
      include_first: whether first positions and <bos> count, too.

    Returns:
      activation, text, position, token, token_id and context (rank), the strongest first.

    Raises:
      ValueError: an unknown layer, neuron or site, or no text with a position that counts.
    """
    _expect(model, tokenizer)
    found = site_of(model, site)
    if len(found.dims) != 3 or not found.per_layer:
        raise ValueError(
            f"neurons are looked for in sites of one vector per position, not {found.name}"
        )
    layer = check_layer(layer, model.config.num_layers)
    size = model.config.axis_sizes(layer)[found.dims[2]]
    neuron = one(neuron, size, "neuron", owner=f"{found.name} has")
    what = {"layer": layer, "neuron": neuron, "site": found.name}
    return strongest(
        *(model, tokenizer, texts, k, what),
        lambda traced: traced.get(site, layer).values[0][:, neuron],
        include_first=include_first,
    )


def strongest(
    model: GemmaTransformer,
    tokenizer: Tokenizer,
    texts: Iterable[Any],
    k: int,
    what: Mapping[str, Any],
    activations: Callable[[Trace], np.ndarray],
    *,
    include_first: bool = False,
    only_on: bool = False,
) -> xarray.Dataset:
    """`top_activations` of anything that has an activation at each position.

    Args:
      model: what computes.
      tokenizer: of the model.
      texts: where to look.
      k: how many tokens, at most.
      what: attributes of the result.
      activations: (T,) of a traced text.
      include_first: whether first positions and <bos> count, too.
      only_on: whether only activations above zero count; none at all give an empty result.
    """
    import xarray

    _expect(model, tokenizer)
    k = indices.number(k, "k")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    texts = [texts] if isinstance(texts, str) else texts
    best: list[tuple[float, int, int, int, str]] = []
    seen, count = set[bytes](), 0
    for number, text in enumerate(texts):
        traced = trace(model, text, tokenizer=tokenizer, sites=())
        if traced.tokens.tobytes() in seen:
            continue
        seen.add(traced.tokens.tobytes())
        counts = np.ones(len(traced.tokens), bool)
        if not include_first:
            counts[0] = False
            counts &= traced.tokens != tokenizer.bos_id
        count += int(counts.sum())
        if not counts.any():
            continue
        values = np.asarray(activations(traced))
        counts &= (values > 0) if only_on else True
        at = np.flatnonzero(counts)
        for p in at[np.argsort(-values[at], kind="stable")[:k]].tolist():
            around = traced.tokens[max(0, p - _CONTEXT) : p + _CONTEXT // 2 + 1].tolist()
            context = tokenizer.decode(around)
            best.append((float(values[p]), number, p, int(traced.tokens[p]), context))
        best = sorted(best, key=lambda row: -row[0])[:k]
    if not seen:
        raise ValueError("texts is empty: pass at least one text")
    if not count:
        raise ValueError("the texts have no position but the first, which is left out")
    columns = {
        "activation": np.array([row[0] for row in best], np.float32),
        "text": np.array([row[1] for row in best], np.int64),
        "position": np.array([row[2] for row in best], np.int64),
        "token_id": np.array([row[3] for row in best], np.int32),
        "token": [tokenizer.token_text(row[3]) for row in best],
        "context": [row[4] for row in best],
    }
    return xarray.Dataset(
        {name: ("rank", values) for name, values in columns.items()},
        coords={"rank": np.arange(len(best))},
        attrs={"model": model.title, "interventions": lines_of(model.interventions), **what},
    )


def _expect(model: Any, tokenizer: Any) -> None:
    """Raises TypeError for something else in their places."""
    expect(model, GemmaTransformer, "model", "model, tokenizer = gnb.load(...)")
    if not hasattr(tokenizer, "token_text"):
        expect(tokenizer, Tokenizer, "tokenizer", "model, tokenizer = gnb.load(...)")
