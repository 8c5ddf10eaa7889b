"""Dense attention without its mask: the same numbers, where the mask says no more than causality and padding do."""

import pytest
import torch
import torch.nn.functional as F
from support.eager_forms import llama
from support.graph_modules import rewritten
from support.hidden_states import Stack, hidden_states
from support.mask_cases import CASES, PADDING

from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes import unmask_dense
from zipvl_compile.passes.graph.graph import calls, example

N = PADDING.shape[1]
CAUSAL = [name for name, (_, parts) in CASES.items() if "causal" in parts]
OTHER = {
    "bidirectional": lambda p, x: p[:, None, None, :].bool(),
    "window": lambda p, x: torch.ones(N, N, dtype=torch.bool).tril().triu(-3),
    "data": lambda p, x: torch.ones(N, N, dtype=torch.bool).tril() & (x[:, None, :, :1] > 0),
    "bias": lambda p, x: torch.full((N, N), float("-inf")).triu(1) + torch.arange(N) / 10,
}


class Attention(torch.nn.Module):
    def __init__(self, make, newest=None, attend=F.scaled_dot_product_attention):
        super().__init__()
        self.make, self.newest, self.attend = make, newest, attend

    def forward(self, padding, x):
        q, k, v = (x.view(2, x.shape[1], heads, 4).transpose(1, 2) * (i + 1) for i, heads in enumerate((2, 2, 2)))
        mask = self.make(padding, x)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(x.dtype)
        if self.newest:
            q, mask = q[:, :, -self.newest :], mask[..., -self.newest :, :]
        return self.attend(q, k, v, attn_mask=mask)


def tokens(n=N):
    return torch.randn(2, n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    monkeypatch.setattr(unmask_dense, "LEAST", N)


def run(module, *inputs, before=(), inner="eager", dynamic=False):
    return rewritten(module, *inputs, passes=[*before, "unmask_dense"], inner=inner, dynamic=dynamic)


def check(module, padding, x, **options):
    """Return the graph, after a check of the rows of every token that is no padding."""
    graph, got = run(module, padding, x, **options)
    with torch.no_grad():
        expected = module(padding, x)
    real = padding.bool()
    torch.testing.assert_close(got.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=1e-12, atol=1e-12)
    return graph


@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CAUSAL)
def test_the_mask_is_gone_and_the_answer_the_same(case, dynamic, padded):
    padding = PADDING if padded else torch.ones_like(PADDING)
    graph = check(Attention(CASES[case][0]), padding, tokens(), dynamic=dynamic)
    (attention,) = calls(graph, ops.sparse_attention)
    assert attention.args[5] is True and not calls(graph, F.scaled_dot_product_attention)
    assert (attention.args[4] is not None) == ("padding" in CASES[case][1])
    if "vmap" not in case:  # its calls come in pairs and stay
        shapes = [example(node).shape for node in graph.nodes if isinstance(example(node), torch.Tensor)]
        assert not any(len(shape) >= 2 and shape[-1] == shape[-2] for shape in shapes), "an [n, n] tensor is left"


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
def test_compiled(inner, padded):
    padding = PADDING if padded else torch.ones_like(PADDING)
    check(Attention(CASES["transformers"][0]), padding, tokens(), inner=inner, dynamic=True)


@pytest.mark.parametrize("form", OTHER)
def test_other_masks_stay(form):
    graph = check(Attention(OTHER[form]), torch.ones_like(PADDING), tokens())
    assert not calls(graph, ops.sparse_attention) and calls(graph, F.scaled_dot_product_attention)


def test_newest_queries_only_stay():
    """The mask of a chunk or a demanded row is not that of a whole prompt."""
    graph = check_rows(Attention(CASES["tril-and"][0], newest=3))
    assert not calls(graph, ops.sparse_attention)


def check_rows(module):
    graph, got = run(module, PADDING, tokens())
    with torch.no_grad():
        torch.testing.assert_close(got, module(PADDING, tokens()))
    return graph


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_short_prompt_keeps_its_mask(monkeypatch, dynamic):
    monkeypatch.setattr(unmask_dense, "LEAST", N + 1)
    graph = check(Attention(CASES["transformers"][0]), PADDING, tokens(), dynamic=dynamic)
    assert not calls(graph, ops.sparse_attention)


def test_attention_without_a_mask_stays():
    graph = check(Attention(lambda p, x: None), torch.ones_like(PADDING), tokens())
    assert not calls(graph, ops.sparse_attention)


def test_layers_share_one_look_at_the_padding_and_the_last_row_stays_narrow():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = Stack(lambda x: x[:, -1:], layers=3)

        def forward(self, padding, x):
            return self.stack(x, CASES["tril-and"][0](padding, x))

    module, x = Model(), hidden_states(N, batch=2)
    graph, outputs = run(module, PADDING, x, before=["demand_rows"])
    assert len(calls(graph, ops.hiding_rows)) == 1 and len(calls(graph, ops.sparse_attention)) == 2
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], module(PADDING, x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
def test_attention_written_out(padded, softcap):
    def attend(q, k, v, attn_mask):
        return llama(q, k, v, attn_mask, 0.4, softcap)

    padding = PADDING if padded else torch.ones_like(PADDING)
    graph = check(Attention(CASES["transformers-additive"][0], attend=attend), padding, tokens())
    assert calls(graph, ops.sparse_attention) and not calls(graph, F.softmax)
