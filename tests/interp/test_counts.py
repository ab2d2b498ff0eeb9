"""How many heads, positions, layers or best tokens are asked for: few counts are compiled."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.executables import limits
from gemma_nb.interventions import Intervention, Where
from gemma_nb.interventions.numbers import real

IDS = list(range(70, 92))
RNG = np.random.default_rng(0)
ROWS, VALUES = RNG.random((8, 8), np.float32), RNG.normal(size=(8, 32)).astype(np.float32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every program that is compiled or loaded."""
    found: list[int] = []
    monkeypatch.setattr(limits, "note", lambda: found.append(1))
    return found


def some(k: int, reference: Any) -> list[Intervention]:
    """Each intervention, of `k` heads, layers or positions where it takes several."""
    heads = {i: [n for n in range(2) if 2 * i + n < k] for i in range(3)}
    at = range(3, 3 + k)
    return [
        gnb.AblateHeads(heads, "resample", reference=reference, positions=at),
        gnb.AblateMLP(range(1 + k // 3), "mean", reference=reference),
        gnb.ScaleHeads({i: dict.fromkeys(of, 0.5) for i, of in heads.items()}),
        gnb.Patch("residual", 0, at, VALUES[:k]),
        gnb.Patch(
            "z", 1, at, VALUES[:k, : 16 * (1 + k % 2)].reshape(k, -1, 16), heads=range(1 + k % 2)
        ),
        gnb.KnockOut(2, range(1 + k % 2), queries=at, keys=range(k)),
        gnb.ReplaceAttention(1, 0, ROWS[:k, :k], queries=at),
        gnb.Steer(1, VALUES[0], positions=at),
    ]


def bare(item: Any) -> Any:
    """An intervention without padding, as files of earlier versions have it."""
    fields = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    places = {"layers", "heads", "positions", "queries", "listed"}
    kept = {n: real(x) for n, x in fields.items() if n in places and isinstance(x, jax.Array)}
    rows = next((kept[n] for n in ("layers", "positions", "queries", "listed") if n in kept), None)
    for name, value in fields.items():
        if isinstance(value, Where):
            fields[name] = bare(value)
        elif name in kept:
            fields[name] = jnp.asarray(value)[kept[name]]
        elif name in ("factors", "values", "value", "weights") and rows is not None:
            cut = jnp.asarray(value)[rows]
            if isinstance(item, gnb.Patch) and item.heads is not None:
                cut = cut[:, kept["heads"]]
            if name == "values":
                cut = cut[:, ~np.isnan(np.asarray(cut)).any(axis=(0, 2))]
            if name == "weights":
                cut = cut[:, : len(cut)]
            fields[name] = cut
    made = object.__new__(type(item))
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def final(model: Any, items: list[Intervention]) -> np.ndarray:
    trace = gnb.trace(model.intervene(*items), IDS, sites=())
    return np.asarray(trace.get("final").values)


def test_interventions_of_other_counts_compile_nothing(
    tiny_model: Any, compiled: list[int]
) -> None:
    model, _ = tiny_model
    references = [gnb.trace(model, IDS[:n], sites=()) for n in (9, 10, 12, 15)]
    final(model, some(6, references[0]))
    compiled.clear()
    found = [final(model, some(k, r)) for k, r in zip((1, 2, 3, 5), references, strict=True)]
    assert not compiled
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(found))


def test_padding_changes_no_number(tiny_model: Any) -> None:
    model, _ = tiny_model
    items = some(5, gnb.trace(model, IDS[:15], sites=()))
    np.testing.assert_array_equal(final(model, items), final(model, [bare(x) for x in items]))


def test_parts_of_a_trace_of_other_counts_compile_nothing(
    tiny_model: Any, compiled: list[int]
) -> None:
    model, tokenizer = tiny_model
    trace = gnb.trace(model, IDS, tokenizer=tokenizer)
    sae = gnb.SparseAutoencoder(
        *(jnp.asarray(RNG.normal(size=(32, 40)), jnp.float32), jnp.zeros(40)),
        *(jnp.zeros((40, 32)), jnp.zeros(32), jnp.zeros(40)),
        layer=1,
    )
    whole, lens = trace.get("mlp_hidden", 1).values, gnb.logit_lens(trace, 9, watch=[7, 8, 9, 10])
    features, best = sae.features(trace).values, sae.top_features(trace, 8)

    def ask(k: int) -> None:
        at = [2 * i for i in range(k)]
        np.testing.assert_array_equal(
            trace.get("mlp_hidden", 1, at).values, whole[:, at], err_msg=str(k)
        )
        other = gnb.logit_lens(trace, k, positions=at, watch=range(7, 10))
        np.testing.assert_array_equal(other.token_id, lens.token_id[:, at, :k])
        np.testing.assert_array_equal(other.watched_rank, lens.watched_rank[:, at, :3])
        np.testing.assert_allclose(sae.features(trace, at).values, features[at], atol=1e-6)
        found = sae.top_features(trace, k, at)
        np.testing.assert_array_equal(found.feature, best.feature[at, :k])

    ask(5)
    compiled.clear()
    for k in (2, 3, 6, 8):
        ask(k)
    assert not compiled


def test_heads_of_a_trace_of_other_counts(tiny_model: Any) -> None:
    trace = gnb.trace(tiny_model[0], IDS, sites=())
    whole, z = trace.get("attention", 1).values, trace.get("z", 1).values
    for heads in ([0], [1], [0, 1]):
        found = trace.get("attention", 1, [3, 20], heads).values
        np.testing.assert_array_equal(found, whole[:, heads][:, :, [3, 20]])
        np.testing.assert_array_equal(trace.get("z", 1, None, heads).values, z[:, :, heads])


def test_before_there_are_too_many_programs_all_are_let_go(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny_model
    forgotten: list[int] = []
    monkeypatch.setattr(limits, "_allowed", lambda: 100)
    monkeypatch.setattr(jax, "clear_caches", lambda: forgotten.append(1))
    monkeypatch.setattr(limits, "on_relief", [lambda: forgotten.append(2)])
    limits.relieve()
    monkeypatch.setattr(limits, "_new", 1000)
    gnb.trace(model, IDS, sites=())
    gnb.trace(model, IDS, sites=())
    assert forgotten in ([2, 1], [])
    # Only Linux has such a limit.
    assert bool(forgotten) == limits._MAPS.exists()
