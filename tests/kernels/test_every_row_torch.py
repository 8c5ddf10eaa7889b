"""What is particular to window_attention with queries="all" by PyTorch: its blocks of rows."""

import pytest
import torch
from support.cases import choose

from zipvl_compile.kernels import every_row_torch
from zipvl_compile.kernels.every_row_torch import attend_every_row_torch
from zipvl_compile.kernels.window_attention_torch import first_visible


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "not"])
def test_a_block_may_have_any_size(cases, monkeypatch, is_causal, groups, rows):
    q, k, v = cases.qkv(batch=2, n=150, dim=8)
    positions = choose(2, groups, 150, 40)
    index = positions.repeat_interleave(k.shape[1] // groups, 1)[..., None].expand(-1, -1, -1, 8)
    given = (q, k, v, k.gather(2, index), v.gather(2, index), positions, first_visible(torch.ones(2, 150), 4), None)
    options = (is_causal, None, None, 20)
    expected = attend_every_row_torch(*given, *options)
    monkeypatch.setattr(every_row_torch, "BLOCK_ROWS", rows)
    torch.testing.assert_close(attend_every_row_torch(*given, *options), expected, rtol=1e-9, atol=1e-9)


def test_early_kept_tokens_take_no_mask_in_one_sample(cases, monkeypatch):
    """Most of the work is attention without a mask, which is what makes it fast."""
    masks = []
    attend = every_row_torch.with_lse

    def seen(q, k, v, mask, *options, **others):
        masks.append((k.shape[2], mask is not None))
        return attend(q, k, v, mask, *options, **others)

    monkeypatch.setattr(every_row_torch, "with_lse", seen)
    q, k, v = cases.qkv(n=512, heads="mqa", dim=8)
    positions = torch.arange(0, 512, 2)[None, None]
    first = first_visible(torch.ones(1, 512), 4)
    attend_every_row_torch(q, k, v, k[:, :, ::2], v[:, :, ::2], positions, first, None, True, None, None, 20)
    assert [one for one in masks if not one[1]] == [(64, False), (128, False), (192, False)]
    assert max(keys for keys, masked in masks if masked) == 4 + 128 + 19
