"""torch.library.opcheck: schema, autograd registration, fake implementation and dynamic shapes of every operator."""

import pytest
import torch
from torch.library import opcheck

from zipvl_compile.kernels import ops as _ops  # noqa: F401  (registers the operators)

ops = torch.ops.zipvl
ALL = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v = draw(2, 4, 10, 8), draw(2, 2, 10, 8), draw(2, 2, 10, 6)
    positions = torch.tensor([[[0, 3, 9]], [[1, 2, 9]]])
    mask = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    return q, k, v, positions, mask


softcaps = pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])


def check(op, *args):
    """Run every check, the default; a result that lists fewer would be a silent gap."""
    assert dict.fromkeys(ALL, "SUCCESS") == opcheck(op, args)


@softcaps
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_token_scores(dtype, masked, groups, softcap):
    q, k, _, _, mask = tensors(dtype)
    check(ops.token_scores.default, q, k, mask if masked else None, not masked, 0.3, softcap, 4, 3, 0, groups)


# Under tau < 1 the number of kept tokens depends on the data. opcheck's dynamic-shape check needs no flag for it: it
# traces with make_fx, whose ShapeEnv allows unbacked sizes, unlike Dynamo's (see backend._allow_data_dependent_sizes).
@pytest.mark.parametrize("rule", [(0.8, None), (1.0, None), (0.8, 0.4)], ids=["tau", "tau-1", "keep_ratio"])
@pytest.mark.parametrize("keep_recent", [1, 3])
def test_select_tokens(rule, keep_recent):
    q, k, *_ = tensors()
    scores, visible = torch.ops.zipvl.token_scores(q, k, None, True, 1.0, None, 4, 3, 0, 1)
    check(ops.select_tokens.default, scores, visible, *rule, keep_recent)


def test_gather_kv():
    _, k, v, positions, _ = tensors()
    check(ops.gather_kv.default, k, v, positions, 0)


def test_hiding_rows():
    check(ops.hiding_rows.default, torch.ones(2, 1, 1, 9, dtype=torch.bool))
    check(ops.hiding_rows.default, torch.arange(9).view(1, 1, 1, 9) > 3)


def test_probe_positions():
    check(ops.probe_positions.default, tensors()[1], 4, 3, 0)


def test_token_positions():
    check(ops.token_positions.default, tensors()[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gather_tokens(dtype):
    _, k, _, positions, _ = tensors(dtype)
    check(ops.gather_tokens.default, k, positions, 0)
    # Spare rows are unwritten memory: the dynamic-shape check compares two runs bit for bit, so it cannot hold there.
    opcheck(ops.gather_tokens.default, (k, positions, 2), test_utils=sorted(ALL - {"test_aot_dispatch_dynamic"}))


@softcaps
@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_sparse_attention(masked, queries, softcap):
    q, k, v, positions, mask = tensors()
    keys, values = ops.gather_tokens(k, positions, 0), ops.gather_tokens(v, positions, 0)
    check(
        ops.sparse_attention.default,
        q,
        keys,
        values,
        positions,
        mask if masked else None,
        not masked,
        0.3,
        softcap,
        queries,
    )


def test_append_tokens():
    _, k, v, _, _ = tensors()
    keys, values = torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16, 6)
    check(ops.append_tokens.default, keys, values, k[:, :, :3], v[:, :, :3], 5)


@softcaps
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_decode_attention(masked, m, softcap):
    q, k, v, positions, _ = tensors()
    mask = torch.ones(2, 1, m, 17, dtype=torch.bool) if masked else None
    check(ops.decode_attention.default, q[:, :, :m].contiguous(), k, v, positions, 10, 17, mask, 0.3, softcap)


def test_kv_view():
    _, k, *_ = tensors()
    check(ops.kv_view.default, k, ops.token_positions(k[:, :, :8]), 8, 9)
