"""A stream of the small model."""

import pytest

from gemma_nb.sampling.decode import Decoder


@pytest.fixture
def decoder(tiny_model):
    return Decoder(tiny_model[0], limit=200, top_k=12)
