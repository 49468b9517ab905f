"""Random calls of every method: a row alone is the row in its batch, cached is uncached, or the call is refused."""

import pytest
from factories import METHODS, tiny_model
from random_batches import check_random_calls

SEED = 1000


@pytest.fixture(scope="module", params=METHODS)
def model(request):
    return tiny_model(request.param)


def test_fifty_random_calls(model):
    seen = check_random_calls(model, SEED, 50)
    # every kind came, and what is promised to be given was
    assert {kind for kind, _ in seen} == {"rows", "cache", "second_turn", "packed_rows", "hole"}
    assert seen["second_turn", "given"] > 0 and seen["hole", "given"] > 0
    assert seen["rows", "refused"] == seen["cache", "refused"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 11))
def test_a_thousand_random_calls(model, part):
    check_random_calls(model, SEED + part, 100)
