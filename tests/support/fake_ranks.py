"""Two ranks of which one runs, and whose sums leave what they are given: for graphs, not for numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

N, WIDTH, HEADS = 12, 16, 2
ROWS, COLUMNS = Shard(0), Shard(1)
X = torch.randn(1, N, WIDTH, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def two_ranks() -> Iterator[DeviceMesh]:
    """Be the first of two ranks."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def spread(mesh: DeviceMesh, *shape: int, on: Placement, whole: tuple[int, ...] | None = None) -> DTensor:
    """Return a weight of which this rank holds a part of a shape; the whole may be told."""
    part = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    told = {} if whole is None else {"shape": torch.Size(whole), "stride": (whole[1], 1)}
    return DTensor.from_local(part, mesh, [on], run_check=False, **told)


def weights(mesh: DeviceMesh | None, q: Placement = ROWS, out: Placement = COLUMNS) -> list[torch.Tensor]:
    """Return the weights of Q, K, V and of the output projection; plain ones without a mesh."""
    if mesh is None:
        return [torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return [*(spread(mesh, WIDTH, WIDTH, on=q) for _ in range(3)), spread(mesh, WIDTH, WIDTH, on=out)]


def local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, local(weight)).view(1, N, HEADS, -1).transpose(1, 2)


def attend(x: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor, wv: torch.Tensor) -> torch.Tensor:
    """Return the attention of this rank's heads, `[1, n, width]`."""
    out = F.scaled_dot_product_attention(heads(x, wq), heads(x, wk), heads(x, wv), is_causal=True)
    return out.transpose(1, 2).reshape(1, N, -1)


def graph_of(function, *inputs, gradients: bool = False) -> torch.fx.GraphModule:
    """Return what Dynamo traces of a function."""
    found = []

    def keep(gm, _):
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(gradients):
        torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    (gm,) = found
    return gm


__all__ = ["HEADS", "WIDTH", "N", "Replicate", "Shard", "X", "attend", "graph_of", "heads", "local", "spread",
           "two_ranks", "weights"]  # fmt: skip
