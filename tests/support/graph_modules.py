"""Small modules whose graphs hold what the cache layer traces, and attention in the forms that models write."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from zipvl_compile.dynamo import allow_data_dependent_sizes
from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes.settings import Settings
from zipvl_compile.pipeline import PIPELINE, rewrite

SPARE = 4
FORMS = ("enable_gqa", "expand", "expand-view", "interleave", "torch-interleave", "plain")

# What a rewrite orphans for each form of repeating K and V.
REPEATS = {
    "enable_gqa": Counter(),
    "plain": Counter(),
    "expand": Counter({"getitem": 2, "expand": 2, "reshape": 2}),
    "interleave": Counter({"repeat_interleave": 2}),
    "torch-interleave": Counter({"repeat_interleave": 2}),
}


def qkv(n=20, batch=2, heads=4, kv_heads=2, dim=8, value_dim=6, seed=0, dtype=torch.float64):
    """Return random q, k, v, peaked enough that a few tokens hold most of the attention."""
    generator = torch.Generator().manual_seed(seed)

    def draw(h, d):
        return torch.randn(batch, h, n, d, generator=generator, dtype=torch.float64).to(dtype)

    return draw(heads, dim) * 3, draw(kv_heads, dim), draw(kv_heads, value_dim)


def repeat(x, factor: int, form: str):
    """Repeat the heads of `x [B, H, n, D]` as a model of that form does; "enable_gqa" and "plain" leave them."""
    batch, heads, n, width = x.shape
    if form == "expand":
        return x[:, :, None, :, :].expand(batch, heads, factor, n, width).reshape(batch, heads * factor, n, width)
    if form == "expand-view":
        return x[:, :, None].expand(batch, heads, factor, n, width).contiguous().view(batch, heads * factor, n, width)
    if form == "interleave":
        return x.repeat_interleave(factor, dim=1)
    if form == "torch-interleave":
        return torch.repeat_interleave(x, factor, dim=1)
    return x


def attend(q, k, v, form="enable_gqa", **options):
    """Call SDPA with K and V repeated in the given form."""
    factor = q.shape[1] // k.shape[1]
    if form == "enable_gqa":
        options["enable_gqa"] = True
    return F.scaled_dot_product_attention(q, repeat(k, factor, form), repeat(v, factor, form), **options)


def cache(k, v):
    """Trace what CompactLayer traces in prefill: positions and both buffers."""
    kept = ops.token_positions(k)
    return ops.gather_tokens(k, kept, SPARE), ops.gather_tokens(v, kept, SPARE), kept


class Prefill(nn.Module):
    """One prefill attention; returns its output and the cache: key buffer, value buffer, positions."""

    def __init__(self, form="enable_gqa", **options):
        super().__init__()
        self.form, self.options = form, options

    def forward(self, q, k, v, mask=None):
        stored = cache(k, v)
        return attend(q, k, v, self.form, attn_mask=mask, **self.options), *stored


class Decode(nn.Module):
    """One decode attention after `append_tokens`, over a prompt of `prompt` tokens and `n` logical tokens."""

    def __init__(self, prompt, n, form="enable_gqa", **options):
        super().__init__()
        self.prompt, self.n, self.form, self.options = prompt, n, form, options

    def forward(self, q, k, v, keys, values, kept, mask=None):
        at = kept.shape[2] + self.n - self.prompt - k.shape[2]
        ops.append_tokens(keys, values, k, v, at)
        where = (kept, self.prompt, self.n)
        return attend(
            q, ops.kv_view(keys, *where), ops.kv_view(values, *where), self.form, attn_mask=mask, **self.options
        )


def pack(q, k, v):
    """Return q, k, v as one `[B, n, width]` tensor: in a model, one length is behind all three."""
    return torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], 2)


class Packed(nn.Module):
    """A module over q, k, v that takes them packed, so that their lengths are one symbol under dynamic shapes."""

    def __init__(self, module, q, k, v):
        super().__init__()
        self.module, self.heads = module, [x.shape[1] for x in (q, k, v)]
        self.widths = [x.shape[1] * x.shape[3] for x in (q, k, v)]

    def forward(self, x, *others):
        parts = x.split(self.widths, dim=2)
        heads = [part.unflatten(2, (h, -1)).transpose(1, 2) for part, h in zip(parts, self.heads, strict=True)]
        return self.module(*heads, *others)


class Layer(nn.Module):
    """One decoder layer: projections, attention, residual; `peak` sharpens its attention."""

    def __init__(self, form, peak, width=16, heads=4, kv_heads=2):
        super().__init__()
        self.form, self.peak, self.heads, self.kv_heads = form, peak, heads, kv_heads
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, width // heads * kv_heads) for _ in range(2))

    def forward(self, x):
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2) * self.peak
        k = self.k(x).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v(x).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
        stored = cache(k, v)
        out = attend(q, k, v, self.form, is_causal=True)
        return x + self.o(out.transpose(1, 2).flatten(2)), stored


class Decoder(nn.Module):
    """Several layers; their names are `layers.0`, `layers.1` and so on."""

    def __init__(self, form="enable_gqa", layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Layer(form, peak=4.0 ** (i + 1)) for i in range(layers))

    def forward(self, x):
        caches = []
        for layer in self.layers:
            x, stored = layer(x)
            caches.append(stored)
        return x, caches


class Wrapped(nn.Module):
    """A module around a function, for graphs of one kind only."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def rewritten(module, *inputs, passes, inner="eager", dynamic=False):
    """Return the graph after the passes, given by name, and what it gives, compiled by `inner`."""
    graphs = []

    def backend(gm, inputs):
        allow_data_dependent_sizes(gm.graph)
        rows = {row.name: row for row in PIPELINE}
        done = rewrite(gm.graph, Settings(), tuple(rows[name] for name in passes))
        assert not done.faults, done.faults
        gm.recompile()
        graphs.append(gm.graph)
        return torch._dynamo.lookup_backend(inner)(gm, inputs)

    torch._dynamo.reset()
    with torch.no_grad():
        outputs = torch.compile(module, backend=backend, dynamic=dynamic)(*inputs)
    torch._dynamo.reset()
    return graphs[0], outputs


class Small(nn.Module):
    """One linear map, without attention."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x)


def trace(function, *inputs, dynamic=None):
    """Return the graph that Dynamo hands to a backend."""
    graphs = []

    def keep(gm, example_inputs):
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, dynamic=dynamic, fullgraph=True)(*inputs)
    return graphs[0]
