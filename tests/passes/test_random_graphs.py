"""Attention graphs drawn at random: unchanged numbers at tau=1, the paper's numbers below it, nothing left behind."""

import numpy as np
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from support import eager_forms
from support.recording import SELECTION, outcomes
from torch import nn

from zipvl_compile.kernels.probe_rows import probe_rows

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4}
SDPA_FORMS = ("enable_gqa", "expand", "interleave", "torch-interleave")


def mask_of(kind, n, batch, heads, generator):
    """Return a mask, bool or additive, and whether SDPA's causal flag stands for it."""
    triangle = torch.ones(n, n, dtype=torch.bool).tril()
    real = torch.ones(batch, n, dtype=torch.bool)
    real[0, : n // 4] = False
    masks = {
        "causal": triangle[None, None],
        "padding": triangle & real[:, None, None],
        "window": (triangle & triangle.T.tril(3).T.tril().logical_or(triangle.triu(-5)))[None, None],
        "prefix": (triangle | (torch.arange(n) < n // 3))[None, None],
        "per-head": (triangle & (torch.rand(1, heads, n, n, generator=generator) < 0.7)) | torch.eye(n).bool(),
        "row": real[:, None, None],
    }
    return masks[kind]


class Drawn(nn.Module):
    def __init__(self, modules, form, gqa, scale, softcap, is_causal):
        super().__init__()
        self.modules, self.form, self.gqa = modules, form, gqa
        self.scale, self.softcap, self.is_causal = scale, softcap, is_causal

    def forward(self, q, k, v, mask=None):
        stored = self.modules.cache(k, v)
        if self.form == "sdpa":
            more = {"attn_mask": mask, "is_causal": self.is_causal, "scale": self.scale}
            return self.modules.attend(q, k, v, self.gqa, **more), *stored
        wide = (self.modules.repeat(x, q.shape[1] // k.shape[1], self.gqa) for x in (k, v))
        return self.form(q, *wide, mask, self.scale, self.softcap), *stored


@settings(
    max_examples=60, deadline=None, print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_drawn_graph(record, modules, by_the_paper, paper, data):
    draw = data.draw
    form = draw(st.sampled_from(["sdpa", *eager_forms.FORMS[:-2]]), label="form")
    kv_heads, factor = draw(st.sampled_from([1, 2]), label="KV heads"), draw(st.sampled_from([1, 2, 3]), label="GQA")
    n, batch = draw(st.integers(2, 24), label="n"), draw(st.integers(1, 3), label="batch")
    dim, value_dim = draw(st.sampled_from([4, 8]), label="Dk"), draw(st.sampled_from([4, 8, 6]), label="Dv")
    dtype = draw(st.sampled_from(list(TOLERANCE)), label="dtype")
    scale = draw(st.sampled_from([0.1, 0.5, 1.0]), label="scale")
    softcap = draw(st.sampled_from([None, 1.5]), label="softcap") if form != "sdpa" else None
    gqa = draw(st.sampled_from(SDPA_FORMS if form == "sdpa" else SDPA_FORMS[1:]), label="heads repeated by")
    kind = draw(st.sampled_from(["causal", "padding", "window", "prefix", "per-head", "row"]), label="mask")
    additive = form != "sdpa" or draw(st.booleans(), label="additive")
    tau = draw(st.sampled_from([0.3, 0.7, 0.95]), label="tau")
    seed = draw(st.integers(0, 2**16), label="seed")

    heads, generator = kv_heads * factor, torch.Generator().manual_seed(seed)
    q, k, v = modules.qkv(n, batch, heads, kv_heads, dim, value_dim, seed, dtype)
    visible = mask_of(kind, n, batch, heads, generator)
    is_causal = form == "sdpa" and kind == "causal"
    mask = (
        torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min) if additive else visible
    )
    module = Drawn(modules, form, gqa, scale, softcap, is_causal)
    inputs = (q, k, v, None if is_causal else mask)

    torch._dynamo.reset()
    dense = module(*inputs)[0]
    same, recorder = record(module, *inputs, tau=1.0)
    assert outcomes(recorder) == [("prefill", "")], "every drawn graph is an attention over a cache"
    seen = visible.expand(batch, heads, n, n).any(-1)  # a query that sees nothing is padding: its output means nothing
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(same[0][seen], dense[seen], rtol=tolerance, atol=tolerance)

    torch._dynamo.reset()
    (out, keys, _, kept), recorder = record(module, *inputs, tau=tau)
    recorder.graphs[0].lint()
    full = visible.expand(batch, -1, n, n)
    doubles = [x.double() for x in (q, k, v)]
    look = {"mask": full, "is_causal": False, "scale": scale, "softcap": softcap}
    _, positions = by_the_paper(*doubles, tau=tau, **look)
    note(f"kept {kept.tolist()}, the paper {positions.tolist()}")
    rows = probe_rows(n, SELECTION["recent_probes"], SELECTION["random_probes"], SELECTION["seed"])
    scores, times_seen = paper.scores(*doubles[:2], rows, **look)
    normalised = scores[:, 0] / np.maximum(times_seen, 1)
    if dtype == torch.float64:
        assert keys.shape[2] == positions.shape[2] + modules.SPARE
        # Tokens of equal score may stand for each other: the sums over heads and rows round differently.
        best, got = (np.take_along_axis(normalised, p[:, 0], 1) for p in (positions, kept.numpy()))
        np.testing.assert_allclose(np.sort(got, 1), np.sort(best, 1), rtol=1e-9, atol=1e-12)
    exact = paper.attention(*doubles, kept.numpy(), **look)
    np.testing.assert_allclose(out[seen].numpy(), exact[seen.numpy()], rtol=tolerance, atol=tolerance)
