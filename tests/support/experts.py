"""A mixture of experts that sorts its tokens by expert, as models of transformers do it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  # defines the grouped product of any dtype
from support.dynamo_graph import dynamo_graph
from support.hidden_states import WIDTH
from torch import Tensor

EXPERTS, TAKEN = 4, 2


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64) / 4


# Of the router, the gate and the input of an expert, and its output.
WEIGHTS = (_draw(EXPERTS, WIDTH), _draw(EXPERTS, WIDTH, 2 * WIDTH), _draw(EXPERTS, WIDTH, WIDTH))
N = 11
X = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def route(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """Return the experts of each token `[n, K]` and their weights."""
    values, ids = torch.topk(F.linear(x, router).softmax(-1), TAKEN, dim=-1)
    values /= values.sum(-1, keepdim=True)
    return ids, values


def grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)


def ends_of(ids: Tensor) -> Tensor:
    """Return where the rows of each expert end, of sorted ids."""
    counts = torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    return torch.cumsum(counts, dim=0, dtype=torch.int32)


def back(order: Tensor) -> Tensor:
    """Return the inverse of an order."""
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0])
    return places


def expert(rows: Tensor, ends: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = grouped(rows, up, ends).chunk(2, dim=-1)
    return grouped(F.silu(gate) * value, down, ends)


def mixture(x: Tensor, router: Tensor, up: Tensor, down: Tensor, inside=lambda rows: rows, undo=back) -> Tensor:
    """Return what the experts give for tokens `[n, C]`; `inside` stands between them and the way back, `undo`."""
    ids, values = route(x, router)
    flat, weights = ids.reshape(-1), values.reshape(-1)
    by_expert, order = torch.sort(flat)
    rows = expert(x[order // TAKEN], ends_of(by_expert), up, down)
    rows = inside(rows * weights[order].unsqueeze(-1))
    return rows[undo(order)].view(x.shape[0], TAKEN, x.shape[1]).sum(1)


def written_out(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return the same, token by token."""
    out = torch.zeros_like(x)
    for row, (token, ids, values) in enumerate(zip(x, *route(x, router), strict=True)):
        for number, weight in zip(ids.tolist(), values, strict=True):
            gate, value = (token @ up[number]).chunk(2)
            out[row] += weight * (F.silu(gate) * value) @ down[number]
    return out


def graph_of(function, *inputs, dynamic=False):
    """Return the graph of a function, and what runs it."""
    if dynamic:
        inputs = (inputs[0].clone(), *inputs[1:])
        torch._dynamo.mark_dynamic(inputs[0], 0)
    return dynamo_graph(function, *inputs, fullgraph=True)
