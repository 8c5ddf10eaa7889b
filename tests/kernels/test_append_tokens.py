"""append_tokens: new tokens go into the spare rows of the cache in place, bit for bit, and nothing else changes."""

import pytest
import torch
from support.compare_kernels import DTYPES
from support.implementations import gpu_only, in_every_dtype

from zipvl_compile.kernels.append_tokens import append_tokens


def buffers():
    """Return empty keys and values with room for six tokens."""
    return torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 5)


@pytest.mark.parametrize("m", [1, 3])
def test_it_writes_in_place_and_only_its_rows(implementation, m):
    keys, values = implementation.given(*buffers())
    where = keys.data_ptr(), values.data_ptr()
    k, v = implementation.given(torch.rand(2, 2, m, 8) + 1, torch.rand(2, 2, m, 5) + 1)
    append_tokens(keys, values, k, v, 2, implementation.kernel)
    assert (keys.data_ptr(), values.data_ptr()) == where
    assert torch.equal(keys[:, :, 2 : 2 + m], k) and torch.equal(values[:, :, 2 : 2 + m], v)
    for buffer in (keys, values):
        assert not buffer[:, :, :2].any() and not buffer[:, :, 2 + m :].any()


@pytest.mark.parametrize("m", [1, 3, 20])
@in_every_dtype
def test_every_dtype(implementation, dtype, cases, m):
    _, k, v = cases.qkv(batch=3, n=m, dim=60, value_dim=24, dtype=dtype)
    filled = implementation.given(*(torch.full((3, 2, 30, d), 7.0, dtype=dtype) for d in (60, 24)))
    append_tokens(*filled, *implementation.given(k, v), 6, implementation.kernel)
    for buffer, new in zip(filled, (k, v), strict=True):
        buffer = buffer.cpu()
        assert torch.equal(buffer[:, :, 6 : 6 + m], new)
        assert (buffer[:, :, :6] == 7).all() and (buffer[:, :, 6 + m :] == 7).all(), "nothing else changes"


def test_the_last_row_is_filled(implementation):
    keys, values, k, v = implementation.given(*buffers(), torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 5))
    append_tokens(keys, values, k, v, 5, implementation.kernel)
    assert keys[:, :, 5].all() and values[:, :, 5].all()


REFUSED = {
    "no-room": ({"at": 5}, "room for 7 tokens"),
    "no-room-for-values": ({"values": torch.zeros(2, 2, 3, 5)}, "room for 4 tokens"),
    "before-the-buffer": ({"at": -1}, "at: expected"),
    "other-number-of-values": ({"v": torch.ones(2, 2, 1, 5)}, "v: expected"),
    "other-batch": ({"k": torch.ones(1, 2, 2, 8)}, "k: expected"),
    "other-heads": ({"v": torch.ones(2, 1, 2, 5)}, "v: expected"),
    "other-width": ({"v": torch.ones(2, 2, 2, 1)}, "v: expected"),
    "other-dtype": ({"k": torch.ones(2, 2, 2, 8, dtype=torch.float64)}, "k: expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_written(implementation, name):
    given_, message = REFUSED[name]
    keys, values = implementation.given(*buffers())
    good = {"keys": keys, "values": values, "k": torch.ones(2, 2, 2, 8), "v": torch.ones(2, 2, 2, 5), "at": 2}
    arguments = good | given_
    with pytest.raises(ValueError, match=r"^zipvl::append_tokens: ") as raised:
        append_tokens(*implementation.given(*arguments.values()), kernel=implementation.kernel)
    assert message in str(raised.value)
    assert not keys.any() and not values.any()


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "m"), [("gqa4", 1), ("gqa7", 3), ((40, 40), 1)], ids=str)
@gpu_only
def test_a_large_cache(implementation, cases, heads, m, dtype, kernel):
    end = 3100
    _, k, v = cases.qkv(2, heads, end + 28, 128, dtype=dtype)
    filled = [x.clone() for x in implementation.given(k, v)]
    append_tokens(*filled, *implementation.given(k[:, :, :m], v[:, :, :m]), end, kernel)
    for buffer, x in zip(filled, (k, v), strict=True):
        assert torch.equal(buffer[:, :, end : end + m].cpu(), x[:, :, :m])
        assert torch.equal(buffer[:, :, :end].cpu(), x[:, :, :end])
