"""kv_view: the logical cache where it exists, and an error with a remedy where tokens were dropped."""

import pytest
import torch

from zipvl_compile.kernels.gather_tokens import gather_tokens
from zipvl_compile.kernels.kv_view import kv_view
from zipvl_compile.kernels.token_positions import token_positions


@pytest.mark.parametrize("n", [5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_full_cache_reads_as_itself_without_its_spare_rows(n, dtype):
    k = torch.randn(2, 3, 5, 4).to(dtype)
    buffer = gather_tokens(k, token_positions(k), 6)
    buffer[:, :, 5:7] = 1
    buffer[:, :, 7:] = float("nan")
    view = kv_view(buffer, token_positions(k), 5, n)
    assert view.shape == (2, 3, n, 4) and view.dtype == dtype
    assert torch.equal(view[:, :, :5], k) and (view[:, :, 5:] == 1).all()


def test_the_result_is_a_copy():
    k = torch.ones(1, 1, 3, 2)
    view = kv_view(k, token_positions(k), 3, 3)
    view.zero_()
    assert k.all()


def test_dropped_tokens_are_an_error_that_says_what_to_do():
    buffer, positions = torch.ones(1, 1, 8, 2), torch.tensor([[[0, 4]]])
    with pytest.raises(RuntimeError) as raised:
        kv_view(buffer, positions, 5, 6)
    message = str(raised.value)
    assert "It holds 2 of 5 prompt tokens." in message
    for remedy in ("model.compile(backend='zipvl')", "options={'evict': 'keep'}", "zipvl_compile.explain("):
        assert remedy in message
    assert "{{" not in message and "{why}" not in message
