"""What tests of the package share."""

import pytest
import torch


@pytest.fixture
def fresh_dynamo():
    """Nothing that is compiled before, and nothing that stays."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
