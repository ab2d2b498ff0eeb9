"""Comparisons that tests of interventions share."""

import numpy as np

import gemma_nb as gnb


def logits(model, ids):
    """Logits of a pass over the whole text."""
    return model(gnb.GemmaInputs(np.asarray(ids))).values


def assert_close(a, b, atol=3e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)
