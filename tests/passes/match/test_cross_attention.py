"""Self-attention and cross-attention of equal length look alike but for where their queries and keys come from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, HEADS, TOKENS = 16, 2, 12
MASK = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()


class Attention(nn.Module):
    """Cached attention with queries from `x` and keys and values from `y`; `ranks` makes q, k or v low-rank (MLA)."""

    def __init__(self, cache, ranks=(None, None, None), rotate=False):
        super().__init__()
        self.cache, self.rotate = cache, rotate
        self.projections = nn.ModuleList(self._projection(rank) for rank in ranks)

    @staticmethod
    def _projection(rank):
        if rank is None:
            return nn.Linear(HIDDEN, HIDDEN)
        return nn.Sequential(nn.Linear(HIDDEN, rank), nn.LayerNorm(rank), nn.Linear(rank, HIDDEN))

    def forward(self, x, y, mask):
        pairs = zip(self.projections, (x, y, y), strict=True)
        q, k, v = (project(source).unflatten(2, (HEADS, -1)).transpose(1, 2) for project, source in pairs)
        if self.rotate:
            angle = torch.arange(TOKENS)[:, None] * torch.linspace(1, 2, HIDDEN // HEADS)
            q, k = (t * angle.cos() + t.flip(-1) * angle.sin() for t in (q, k))
        stored = self.cache(k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), *stored


class Decoder(nn.Module):
    """A residual block, then the attention: over the decoder's own hidden states, or over another sequence."""

    def __init__(self, attention, cross):
        super().__init__()
        self.attention, self.cross = attention, cross
        self.norm, self.mlp = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, y, mask):
        h = self.norm(x + self.mlp(x).relu())
        return self.attention(h, y if self.cross else h, mask)


FORMS = {
    "plain": {},
    "rope": {"rotate": True},
    "low-rank": {"ranks": (4, 4, 4), "rotate": True},
    "low-rank keys": {"ranks": (None, 4, 4)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_equal_lengths_do_not_hide_cross_attention(record, modules, form, cross):
    torch.manual_seed(0)
    model = Decoder(Attention(modules.cache, **FORMS[form]), cross).eval()
    x, y = torch.randn(2, 2, TOKENS, HIDDEN)
    _, recorder = record(model, x, y, MASK, tau=0.8)
    (site,) = recorder.noted()
    assert site.reason == ("cross-attention: queries and keys come from different hidden states" if cross else "")
