"""The model that interventions are tried on."""

import pytest

from tests.parity.cases import RANDOM, model_of


@pytest.fixture(scope="module")
def case():
    """A grouped-query model of six layers, three sliding layers to a global one; 24 token ids."""
    return model_of(RANDOM["grouped-query"]), RANDOM["grouped-query"].tokens()[:24]
