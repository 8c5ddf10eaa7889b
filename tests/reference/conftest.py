"""The float64 model of the paper and the shared cases, as fixtures."""

import pytest
from support import cases as shared_cases
from support import paper as model_of_the_paper
from support.quiet import one_thread_without_gradients  # noqa: F401


@pytest.fixture(scope="session")
def paper():
    return model_of_the_paper


@pytest.fixture(scope="session")
def cases():
    return shared_cases
