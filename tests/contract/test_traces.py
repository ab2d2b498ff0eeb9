"""What gm's modules show of themselves, beside the same sites of ours on the same parameters."""

from __future__ import annotations

import numpy as np
import pytest

import gemma_nb as gnb
from tests.contract import theirs
from tests.parity.cases import RANDOM, model_of

ERROR = 2e-5  # of the largest number of a site, in float32


@pytest.fixture(scope="module", params=RANDOM)
def traced(request: pytest.FixtureRequest) -> tuple[gnb.Trace, gnb.Trace]:
    """Ours and gm's, of one text."""
    case = RANDOM[request.param]
    ours = model_of(case)
    wrapped = gnb.GemmaTransformer.wrap(theirs.module(case.config), ours.params)
    tokens = case.tokens()[:60]
    return gnb.trace(ours, tokens, sites=()), gnb.trace(wrapped, tokens, sites=())


def test_every_site_that_gm_shows_holds_what_ours_does(
    traced: tuple[gnb.Trace, gnb.Trace],
) -> None:
    ours, gms = traced
    assert gms.source is not None
    names = [s.name for s in gnb.list_sites(gms.source.model)]
    assert {"attention", "residual", "attn_out", "mlp_out", "logits"} <= set(names)
    for name in names:
        expected, found = ours[name], gms[name]
        assert found.dims == expected.dims
        error = np.abs(found.values - expected.values).max() / np.abs(expected.values).max()
        assert error < ERROR, (name, error)


def test_parts_are_selected_and_what_gm_does_not_show_is_refused(
    traced: tuple[gnb.Trace, gnb.Trace],
) -> None:
    ours, gms = traced
    chosen = {"layers": [1], "positions": [3, -1], "heads": [0]}
    found = gms.get("attention", **chosen)
    expected = ours.get("attention", **chosen)
    assert found.coords.to_dataset().identical(expected.coords.to_dataset())
    np.testing.assert_allclose(found, expected, rtol=0, atol=ERROR)
    with pytest.raises(ValueError, match=r"does not show the site 'q'; it shows embed"):
        gms.get("q")


def test_lenses_of_gms_modules_are_ours(traced: tuple[gnb.Trace, gnb.Trace]) -> None:
    ours, gms = (gnb.logit_lens(trace, 3, watch=[7]) for trace in traced)
    np.testing.assert_array_equal(gms.token_id.values[-1], ours.token_id.values[-1])
    for name in ("logprob", "entropy", "kl", "watched_logprob"):
        np.testing.assert_allclose(gms[name], ours[name], rtol=0, atol=2e-4, err_msg=name)
