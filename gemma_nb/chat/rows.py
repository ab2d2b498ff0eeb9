"""Attention rows of tokens as labelled arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gemma_nb.sampling.rows import AttentionRow

if TYPE_CHECKING:
    import xarray


def labelled(row: AttentionRow) -> xarray.DataArray | None:
    """(layer, head, key) float32 with the names that `chat.trace` uses; None once it is evicted."""
    from gemma_nb.interp.labels import Labels
    from gemma_nb.interventions.base import lines_of
    from gemma_nb.sites import SITES

    ids, weights, home = list(row.ids[: row.position + 1]), row.weights(), row.home
    if weights is None:
        return None
    labels = Labels(
        config=home.config,
        ids=np.array(ids, np.int32),
        tokens=tuple(map(home.tokenizer.token_text, ids)),
        attrs={"model": home.title, "interventions": lines_of(row.interventions)},
        tokenizer=home.tokenizer,
    )
    found = labels.array(
        weights[:, :, None],
        ("layer", "head", "query", "key"),
        "attention",
        {"site": SITES["attention"].holds},
        layers=home.layers,
        positions=[row.position],
    )
    return found.isel(query=0)
