"""Which key positions a query may attend to."""

from __future__ import annotations

from jaxtyping import Array, Bool, Int

from gemma_nb.config import AttentionKind, Sliding


def visible(
    queries: Int[Array, "B T"],
    keys: Int[Array, "B S"],
    kind: AttentionKind,
    given: Bool[Array, "B T _"] | None = None,
) -> Bool[Array, "B T S"]:
    """True where a query at position p may see a key at position s.

    Positions decide, not slots: s <= p, and p - window < s on a sliding layer.  Slots that hold no
    token have position -1 and are seen by nobody.  A caller's own mask replaces the causal rule,
    not the window, which then reaches as far ahead: |p - s| < window (that is how
    google-deepmind/gemma treats `attention_mask`).

    Args:
      queries: positions of the query tokens.
      keys: positions stored in the key slots.
      kind: the layer's kind.
      given: the caller's mask over slots.

    Raises:
      ValueError: `given` covers another number of slots than there are.
    """
    p, s = queries[:, :, None], keys[:, None, :]
    if given is not None and given.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"attention_mask covers {given.shape[-1]} key slots, but there are {keys.shape[-1]} "
            "(the cache length where a cache is given, the number of tokens otherwise)"
        )
    mask = (s >= 0) & (s <= p) if given is None else given
    if not isinstance(kind, Sliding):
        return mask
    return mask & (s > p - kind.window) & (s < p + kind.window)
