"""Decoder layers from hidden states to hidden states, in the forms that models write, for the pruning passes."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from support.graph_modules import cache
from support.recording import LATER
from torch import nn

from zipvl_compile.pipeline import without

WIDTH, HEADS, KV_HEADS, DIM = 16, 4, 2, 4
N, P, PROBES = 20, 6, 12  # keep_ratio 0.3; 6 recent and 6 random probe rows
RATIO = {"keep_ratio": 0.3}


def hidden_states(n=20, batch=1, seed=0):
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split_heads(x, heads):
    return x.view(x.shape[0], x.shape[1], heads, DIM).transpose(1, 2)


def identity(x):
    return x


class RMSNorm(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Layer(nn.Module):
    """A decoder layer; every argument after `fused` is a function that stands at its place in the layer.

    Args:
        bias: of all projections.
        fused: one projection gives q, k and v.
        values, queries: after the projection, `[B, n, width]`.
        attended: after the attention, `[B, n, width]`, before the output projection; it also gets the hidden states.
        projected: after the output projection.
        residual: how the result joins the hidden states.
        joined: the output of the layer, from the hidden states, what the attention adds, and the MLP.
    """

    def __init__(
        self, bias=False, fused=False, values=identity, queries=identity, attended=lambda a, h: a, projected=identity,
        residual=operator.add, joined=None,
    ):  # fmt: skip
        super().__init__()
        self.values, self.queries, self.attended, self.projected = values, queries, attended, projected
        self.residual, self.joined = residual, joined or self.one_after_the_other
        self.norm, self.head_norm, self.mlp_norm = RMSNorm(), RMSNorm(DIM), RMSNorm()
        kv = KV_HEADS * DIM
        self.sizes = [WIDTH, kv, kv]
        if fused:
            self.qkv = nn.Linear(WIDTH, sum(self.sizes), bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, size, bias=bias) for size in self.sizes)
        self.o, self.up = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)

    def project(self, h):
        if hasattr(self, "qkv"):
            return self.qkv(h).split(self.sizes, dim=-1)
        return self.q(h), self.k(h), self.v(h)

    def forward(self, x, mask=None):
        n, h = x.shape[1], self.norm(x)
        q, k, v = self.project(h)
        angles = torch.arange(n, dtype=x.dtype)[:, None] / torch.tensor([1.0, 7.0, 1.0, 7.0], dtype=x.dtype)
        q = self.head_norm(split_heads(self.queries(q), HEADS)) * 4
        q = q * angles.cos() + torch.cat((-q[..., 2:], q[..., :2]), -1) * angles.sin()
        k = split_heads(k, KV_HEADS)
        k = k * angles.cos() + torch.cat((-k[..., 2:], k[..., :2]), -1) * angles.sin()
        v = split_heads(self.values(v), KV_HEADS)
        stored = cache(k, v)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        a = self.attended(a.transpose(1, 2).reshape(x.shape[0], n, WIDTH).contiguous(), h)
        return self.joined(x, self.projected(self.o(a)), self.mlp), stored

    def mlp(self, x):
        return F.silu(self.up(self.mlp_norm(x)))

    def one_after_the_other(self, x, a, mlp):
        x = self.residual(x, a)
        return x + mlp(x)


def layer(**form):
    """Return a layer; every call gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Layer(**form).double().eval()


class Stack(nn.Module):
    """Layers, a last norm, and `read`, which takes what it wants from the last hidden state."""

    def __init__(self, read=identity, layers=2, **form):
        super().__init__()
        self.layers = nn.ModuleList(layer(**form) for _ in range(layers))
        self.norm, self.read = RMSNorm().double(), read

    def forward(self, x, mask=None):
        caches = []
        for one in self.layers:
            x, stored = one(x, mask)
            caches.append(stored)
        return self.read(self.norm(x)), *caches


def widths(graph):
    """Return how many tokens each weight of the graph multiplies, by the name of its module."""
    found: dict[str, list] = {}
    for node in graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "linear":
            weight = node.args[1]
            weight = weight if weight.op == "placeholder" else weight.args[0]  # a part of a fused one
            name = weight.name.split("_parameters")[0].split("modules_")[-1]
            found.setdefault(name, []).append(node.meta["example_value"].shape[1])
    return found


def without_spare(outputs, n):
    """Return all tensors of nested outputs, caches without the rows that are undefined."""
    leaves = []
    for value in outputs:
        if isinstance(value, tuple):
            keys, values, kept = value
            leaves += [keys[:, :, : kept.shape[2]], values[:, :, : kept.shape[2]], kept]
        else:
            leaves.append(value)
    return leaves


def both(record, module, x, *others, **options):
    """Return the graph with pruning and what it pruned, after a check that the outputs are those without."""
    unread = () if options.get("read") else ("read_demands",)
    rows = without(*LATER, *unread, "demand_rows", "prune_projections")
    plain, _ = record(module, x, *others, rows=rows, **options)
    torch._dynamo.reset()
    pruned, recorder = record(module, x, *others, prune=True, **options)
    n = x.shape[1]
    for got, expected in zip(without_spare(pruned, n), without_spare(plain, n), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    return recorder.graphs[0], recorder
