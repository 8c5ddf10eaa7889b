"""The backend: options in, a callable out, whatever the inner compiler; what its graphs are rid of."""

from __future__ import annotations

import operator

import pytest
import torch
from support.graph_modules import Small
from support.tiny_llava import prefill
from support.tiny_models import compiled, inputs, model
from torch import nn

import zipvl_compile.backend as module
from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.dynamo import gradient_switches, is_zipvl
from zipvl_compile.kernels.ops import ops
from zipvl_compile.passes import unmask_dense
from zipvl_compile.passes.graph.graph import calls
from zipvl_compile.report.compile_report import collect

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def graphs(monkeypatch):
    """Return the list of graphs as the inner compiler gets them."""
    seen = []
    compile_ = module._compile

    def keep(gm, example_inputs, options, records=True):
        seen.append(gm.graph)
        return compile_(gm, example_inputs, options, records)

    monkeypatch.setattr(module, "_compile", keep)
    return seen


def test_the_backend_is_found_by_name_and_marked_as_ours():
    assert torch.compile(Small(), backend="zipvl").dynamo_ctx.callback is not None
    assert is_zipvl(module.zipvl)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_a_graph_without_attention_compiles(inner):
    model, x = Small().eval(), torch.randn(4, 3)
    compiled = torch.compile(model, backend="zipvl", options={"inner": inner, "tau": 0.5})
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("given", [{"mode": "reduce-overhead"}, {"options": {"mode": "max-autotune-no-cudagraphs"}}])
def test_mode_is_handed_to_inductor(monkeypatch, given):
    from torch._inductor import compile_fx, list_mode_options

    seen = []

    def spy(gm, example_inputs, config_patches=None, **others):
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    torch.compile(Small().eval(), backend="zipvl", **given)(torch.ones(1, 3))
    assert seen == [list_mode_options(given.get("mode") or given["options"]["mode"])]


def test_without_a_mode_inductor_gets_no_patches(monkeypatch):
    from torch._inductor import compile_fx

    seen = []
    monkeypatch.setattr(
        compile_fx,
        "compile_fx",
        lambda gm, example_inputs, config_patches=None: seen.append(config_patches) or gm.forward,
    )
    torch.compile(Small().eval(), backend="zipvl")(torch.ones(1, 3))
    assert seen == [None]


@pytest.mark.parametrize(("training", "wanted"), [(False, False), (False, True), (True, False), (True, True)])
def test_gradients_flow_to_inputs_and_in_training_mode_to_weights(training, wanted):
    f, x = Small().train(training), torch.ones(2, 3, requires_grad=wanted)
    out = torch.compile(f, backend="zipvl", options={"inner": "aot_eager"})(x)
    assert out.requires_grad is (training or wanted)
    if out.requires_grad:
        out.sum().backward()
        assert torch.equal(f.linear.bias.grad, torch.full((2,), 2.0))
    if wanted:
        assert torch.equal(x.grad, f.linear.weight.sum(0).expand(2, 3))


def test_switches_of_gradients_are_erased(graphs):
    class Rotary(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                y = x.cos()
            return x * y * self.weight

    f, x = Rotary().eval(), torch.ones(2, 3)
    f.weight = nn.Parameter(torch.ones(3))
    out = torch.compile(f, backend="zipvl", options={"inner": "aot_eager"})(x)
    torch.testing.assert_close(out, f(x).detach())
    assert [gradient_switches(graph) for graph in graphs] == [[]]


def test_outputs_that_hold_kept_tokens_are_found():
    graph = torch.fx.Graph()
    k, v = graph.placeholder("k"), graph.placeholder("v")
    positions = graph.call_function(ops.token_positions, (k,))
    keys = graph.call_function(ops.gather_tokens, (k, positions, 4))
    both = graph.call_function(ops.gather_kv, (k, v, positions, 4))
    values = graph.call_function(operator.getitem, (both, 1))
    other = graph.call_function(torch.add, (k, v))
    graph.output((other, keys, values, k, positions))
    assert module._cache_outputs(torch.fx.GraphModule(nn.Module(), graph)) == [1, 2, 4]


def test_a_report_is_made_of_every_graph_with_attention():
    with collect() as reports:
        prefill(compiled("llava", tau=0.8), inputs("llava"))
    assert [site.kind for report in reports for site in report.rewritten] == ["prefill"] * 2


def test_evict_reaches_the_cache():
    for evict, full in (("keep", True), ("drop", False)):
        layers = cache_of(prefill(compiled("llava", keep_ratio=0.5, evict=evict), inputs("llava"))).layers
        assert all((layer.positions.shape[2] == layer.prompt_length) is full for layer in layers)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_dense_prompt_attends_without_its_mask(monkeypatch, graphs, inner):
    monkeypatch.setattr(unmask_dense, "LEAST", 16)
    x = inputs("llava", batch=2, pad=7)
    f, eager = compiled("llava", inner=inner, min_tokens=1 << 20), model("llava")
    assert torch.equal(f.generate(**x, max_new_tokens=6), eager.generate(**x, max_new_tokens=6))
    layers = eager.config.get_text_config().num_hidden_layers
    unmasked = max(len(calls(graph, ops.sparse_attention)) for graph in graphs)
    assert unmasked in (layers - 1, layers)  # of the last one, the demanded row only
