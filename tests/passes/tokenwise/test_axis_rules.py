"""The token axis: computing chosen rows from chosen rows of the inputs equals choosing rows of the whole result.

One path runs the function on every token; the other runs the graph that the analysis made for some tokens only.
"""

import pytest
import torch
import torch.nn.functional as F

from zipvl_compile.passes.graph.graph import size
from zipvl_compile.passes.tokenwise import backward_slice as token_rows
from zipvl_compile.passes.tokenwise.axes import Axes
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.row_select import OfEachSample, Shared, Slice
from zipvl_compile.passes.tokenwise.token_axis import axis_below, carried

B, N, WIDTH, HEADS = 2, 7, 16, 4
GENERATOR = torch.Generator().manual_seed(2)


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


X, W, WIDE, BIAS, SMALL = draw(B, N, WIDTH), draw(WIDTH, WIDTH), draw(3 * WIDTH, WIDTH), draw(WIDTH), draw(4)
KERNEL, SQUARE = draw(WIDTH, WIDTH, 3), draw(N, N)
COS, SIN = draw(1, N, 4), draw(B, N, 4)
COMPLEX = torch.polar(torch.ones(1, N, 2, dtype=torch.float64), draw(1, N, 2))


def heads(x):
    return x.view(B, x.shape[1], HEADS, -1).transpose(1, 2)


def rotate_half(x):
    return torch.cat((-x[..., 2:], x[..., :2]), dim=-1)


def rms_norm(x, weight):
    wide = x.float().double()
    wide = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) + 0 * wide
    return weight * wide.to(x.dtype)


def projection(x):
    return heads(F.linear(x, W, BIAS))


def rope(x):
    q = projection(x)
    return q * COS.unsqueeze(1) + rotate_half(q) * SIN.unsqueeze(1)


def rope_without_batch(x):
    return projection(x) * COS[0]


def partial_rope(x):
    q = projection(x)
    turned, kept = q[..., :2], q[..., 2:]
    return torch.cat([turned * COS.unsqueeze(1)[..., :2], kept], dim=-1)


def complex_rope(x):
    q = F.linear(x, W).view(B, x.shape[1], HEADS, -1)
    pairs = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * COMPLEX[:, :, None]).flatten(3).transpose(1, 2)


def interleaved_rope(x):
    q = projection(x)
    return torch.stack([-q[..., 1::2], q[..., ::2]], dim=-1).flatten(-2) * SIN.unsqueeze(1)


def fused_split(x):
    return heads(F.linear(x, WIDE).split([WIDTH, WIDTH, WIDTH], dim=-1)[1])


def fused_chunk(x):
    return heads(F.linear(x, WIDE).chunk(3, -1)[2])


def fused_slice(x):
    return heads(F.linear(x, WIDE)[..., WIDTH : 2 * WIDTH])


def fused_unbind(x):
    return F.linear(x, WIDE).reshape(B, x.shape[1], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)[1]


def norms(x):
    return heads(F.layer_norm(rms_norm(x, BIAS), (WIDTH,), BIAS))


def head_norm(x):
    return F.rms_norm(projection(x), (4,), SMALL)


def gated(x):
    return projection(x) * torch.sigmoid(heads(x @ W))


def pointwise(x):
    q = F.gelu(projection(x)).clamp(min=-1)
    return torch.where(q > 0, F.silu(q), q.masked_fill(q < -0.5, 0.0)).softmax(-1)


def centred(x):
    """The mean over tokens is the same for every token, whatever it is computed from."""
    return projection(x - x.mean(1, keepdim=True))


def shapes(x):
    q = F.linear(x, W).unflatten(-1, (HEADS, -1)).unsqueeze(0).squeeze(0).permute(0, 2, 1, 3)
    return q.contiguous().repeat_interleave(2, dim=1)


def filled(x):
    q = projection(x)
    out = q.new_empty(B, HEADS, x.shape[1], 6)
    out[..., :4].copy_(q)
    out[..., 4:].copy_(q[..., :2])
    return out


ROW_WISE = [
    projection, rope, rope_without_batch, partial_rope, complex_rope, interleaved_rope, fused_split, fused_chunk,
    fused_slice, fused_unbind, norms, head_norm, gated, pointwise, centred, shapes, filled,
]  # fmt: skip


def narrow(function, choose, batch=None):
    """Run a function of x, compiled so that it computes chosen rows of its result `[B, H, n, D]` only."""

    def backend(gm, _):
        graph = gm.graph
        result, *others = graph.output_node().args[0]
        cone = token_rows.find(graph, {result: Axes(2, batch)}, lambda node, _: node.op == "placeholder")
        gm.mixing = [cone.stops[node] for node in cone.stops if "same for every sample" not in cone.stops[node]]
        if gm.mixing:
            raise Mixes(gm.mixing[0])
        end = graph.output_node()
        rows = choose(others, end)
        taken = {source: rows.take(source, axes, end) for source, axes in cone.sources.items()}
        first = next(iter(cone.sources))
        count = getattr(rows, "count", None) or size(taken[first], cone.sources[first].token, end)
        end.args = ((cone.again(taken, count, end)[result], *others),)
        cone.erase()
        graph.lint()
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=False)


@pytest.mark.parametrize("function", ROW_WISE, ids=lambda f: f.__name__)
def test_a_slice_of_rows(function):
    got = narrow(function, lambda *_: Slice(slice(2, 5)))(X)
    torch.testing.assert_close(got, function(X)[:, :, 2:5], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", ROW_WISE, ids=lambda f: f.__name__)
def test_other_rows_in_every_sample(function):
    index = torch.tensor([[0, 3, 6, 4], [5, 2, 1, 1]])

    def choose(others, end):
        return OfEachSample(others[0], 4)

    got, _ = narrow(lambda x, i: (function(x), i + 0), choose, batch=0)(X, index)
    where = index[:, None, :, None].expand(-1, got.shape[1], -1, got.shape[3])
    torch.testing.assert_close(got, function(X).gather(2, where), rtol=1e-12, atol=1e-12)


def test_rows_by_an_index():
    index = torch.tensor([6, 0, 3])
    got, _ = narrow(lambda x, i: (rope(x), i + 0), lambda others, _: Shared(others[0], 3))(X, index)
    torch.testing.assert_close(got, rope(X)[:, :, index], rtol=1e-12, atol=1e-12)


MIXING = {
    "conv1d": lambda x: heads(F.conv1d(x.transpose(1, 2), KERNEL, padding=1).transpose(1, 2)),
    "cumsum": lambda x: heads(x.cumsum(1)),
    "flip": lambda x: heads(x.flip(1)),
    "roll": lambda x: heads(x.roll(1, 1)),
    "softmax": lambda x: heads(x.softmax(1)),
    "matmul": lambda x: heads(torch.ones(N, N, dtype=x.dtype).tril() @ x),
    "view": lambda x: F.linear(x, W).view(B, HEADS, N, -1),
    "layer_norm": lambda x: heads(F.layer_norm(x, (N, WIDTH))),
    "linear": lambda x: heads(F.linear(x.transpose(1, 2), SQUARE).transpose(1, 2)),
    "cat": lambda x: heads(torch.cat([x[:, 1:], x[:, :1]], 1)),
    "index": lambda x: heads(x[:, [6, 5, 4, 3, 2, 1, 0]]),
    "dropout": lambda x: heads(F.dropout(x, 0.5, training=True)),
    "in place": lambda x: heads(F.linear(x, W).mul_(2)),
    "relu": lambda x: heads(F.relu(F.linear(x, W), inplace=True)),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_or_writes_is_refused(name):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Mixes"):
        narrow(MIXING[name], lambda *_: Slice(slice(2, 5)))(X)


def test_the_axis_goes_down_as_it_goes_up():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    turned = graph.call_method("transpose", (x, 1, 2))
    x.meta["example_value"], turned.meta["example_value"] = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 3, 5)
    assert carried(turned, 1) == {x: 2} and axis_below(turned, {x: 2}) == 1
    summed = graph.call_method("sum", (turned, 1))
    summed.meta["example_value"] = torch.zeros(2, 3, 5)
    assert axis_below(summed, {turned: 2}) == 1
    with pytest.raises(Mixes, match="sum"):
        axis_below(summed, {turned: 1})
