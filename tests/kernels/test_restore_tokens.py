"""restore_tokens: every prompt token in its place, the kept ones bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cases
from support.quantised import in_place

from zipvl_compile.kernels.common import codes as common
from zipvl_compile.kernels.common.codes import BITS
from zipvl_compile.kernels.other_tokens import other_tokens
from zipvl_compile.kernels.quantise_tokens import quantise_tokens
from zipvl_compile.kernels.restore_tokens import restore_tokens
from zipvl_compile.kernels.to_host import to_host


def compacted(x, positions, bits, per, spare=2):
    """Return a buffer of the kept rows with spare ones, codes and scales of the others."""
    index = positions.repeat_interleave(x.shape[1] // positions.shape[1], 1)[..., None].expand(-1, -1, -1, x.shape[3])
    buffer = torch.cat([x.gather(2, index), x.new_full((*x.shape[:2], spare, x.shape[3]), float("nan"))], 2)
    return buffer, *quantise_tokens(x, other_tokens(positions, x.shape[2]), bits, per)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(kept=st.integers(0, 70), others=st.sampled_from([0, 1, 63, 64, 65, 130]), groups=st.sampled_from([1, 2, 4]),
       bits=st.sampled_from(BITS), per=st.sampled_from(["channel", "token"]), most=st.sampled_from([1, 1 << 18]),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
       seed=st.integers(0, 99))  # fmt: skip
def test_kept_rows_are_exact_and_others_what_their_codes_say(kept, others, groups, bits, per, most, dtype, seed):
    n = kept + others
    x = torch.randn(2, 4, n, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    positions = cases.choose(2, groups, n, kept, seed)
    buffer, codes, scales = compacted(x, positions, bits, per)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "MOST", most)
        out = restore_tokens(buffer, positions, codes, scales, n)
    assert out.shape == x.shape and out.dtype == dtype
    for b in range(2):
        for h in range(4):
            where = positions[b, h * groups // 4]
            assert torch.equal(out[b, h, where], x[b, h, where])
    exact = in_place(x, other_tokens(positions, n), codes, scales)
    torch.testing.assert_close(out, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=4e-7)
    step = scales[..., 0].double().amax().item() if others else 0.0
    assert n == 0 or (out.double() - x.double()).abs().max() <= step / 2 + 4 * torch.finfo(dtype).eps


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(batch=st.integers(1, 2), groups=st.sampled_from([1, 2]), n=st.integers(0, 20), share=st.floats(0, 1),
       spare=st.integers(0, 3))  # fmt: skip
def test_there_and_back(batch, groups, n, share, spare):
    """Tokens in full, from host memory: every number as it was."""
    x, count = torch.randn(batch, 4, n, 5), round(share * n)
    positions = cases.choose(batch, groups, n, count, n)
    rows = positions.repeat_interleave(4 // groups, 1)[..., None].expand(-1, -1, -1, 5)
    kept = torch.cat([x.gather(2, rows), torch.full((batch, 4, spare, 5), torch.nan)], 2)
    others = torch.cat([to_host(x, other_tokens(positions, n)), torch.full((batch, 4, spare, 5), torch.nan)], 2)
    assert torch.equal(restore_tokens(kept, positions, others, None, n), x)


def test_a_single_channel_is_not_taken_for_a_scale_of_tokens(monkeypatch):
    monkeypatch.setattr(common, "MOST", 1)
    x = torch.randn(1, 1, 150, 1, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(0, 150, 50)[None, None]
    for per in ("channel", "token"):
        buffer, codes, scales = compacted(x, positions, 8, per)
        exact = in_place(x, other_tokens(positions, 150), codes, scales)
        torch.testing.assert_close(restore_tokens(buffer, positions, codes, scales, 150), exact.float())


def test_a_number_of_kept_tokens_that_only_the_data_knows(unbacked):
    x = torch.randn(1, 2, 100, 8, generator=torch.Generator().manual_seed(0))
    shown = torch.arange(100) % 3 == 0
    positions = shown.nonzero().view(1, 1, -1)
    buffer, codes, scales = compacted(x, positions, 4, "channel")

    def step(x, shown):
        positions = shown.nonzero().view(1, 1, -1)
        coded = torch.ops.zipvl.quantise_tokens(x, torch.ops.zipvl.other_tokens(positions, x.shape[2]), 4, "channel")
        kept = torch.ops.zipvl.gather_tokens(x, positions, 2)
        return torch.ops.zipvl.restore_tokens(kept, positions, *coded, x.shape[2])

    assert torch.equal(unbacked(step)(x, shown), restore_tokens(buffer, positions, codes, scales, 100))


KEPT, CODES, SCALES = compacted(torch.ones(2, 4, 9, 8), torch.arange(3).expand(2, 1, -1), 4, "token")
GOOD = {"kept": KEPT, "positions": torch.arange(3).expand(2, 1, -1), "others": CODES, "scales": SCALES, "n": 9}
BAD = {
    "kept-rank": ({"kept": KEPT[0]}, "kept: expected a [batch, heads, tokens, head_dim] tensor, got [4, 5, 8]"),
    "kept-rows": ({"kept": KEPT[:, :, :2]}, "kept: expected at least 3 tokens, as positions has, got 2"),
    "n": ({"n": 2}, "n: expected at least 3 tokens, as positions has, got 2"),
    "positions": ({"positions": GOOD["positions"][:1]}, "positions: expected batch 2"),
    "codes": ({"n": 100}, "others: expected batch, heads and tokens [2, 4, 128], got [2, 4, 64]"),
    "others": ({"others": KEPT, "scales": None}, "others: expected at least 6 tokens, got 5"),
    "scales": (
        {"scales": SCALES[:, :, :63]},
        "scales of others: expected torch.float32 [2, 4, 1, 8, 2] or [2, 4, 64, 1, 2], got torch.float32 [2, 4, 63, ",
    ),
    "dtype": ({"kept": KEPT.half()}, "scales of others: expected torch.float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name):
    given_, message = BAD[name]
    with pytest.raises(ValueError, match=r"^zipvl::restore_tokens: ") as raised:
        restore_tokens(**(GOOD | given_))
    assert message in str(raised.value) and str(raised.value).endswith(".")
