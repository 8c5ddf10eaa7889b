"""A backend that runs passes over a Dynamo graph, records what changed, and executes it node by node."""

import dataclasses
from collections import Counter

import sympy
import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from zipvl_compile.passes import demand_rows, prune_projections, read_compact_cache, sparsify_prefill
from zipvl_compile.passes.match import left_dense as leave_dense

SELECTION = {
    "tau": 0.8,
    "keep_ratio": None,
    "recent": 6,
    "random": 6,
    "seed": 3,
    "keep_recent": 1,
    "all_queries": False,
    "drop": True,
    "min_tokens": 0,
}


def _name(node):
    if node.op != "call_function":
        return str(node.target) if node.op == "call_method" else node.op
    packet = getattr(node.target, "overloadpacket", node.target)
    return f"zipvl.{packet.__name__}" if "zipvl" in str(packet) else packet.__name__


def _returned_inputs(graph):
    return {node for node in graph.output_node().all_input_nodes if node.op == "placeholder"}


def _nodes(graph):
    return {node: _name(node) for node in graph.nodes}


class CheckedRun(torch.fx.Interpreter):
    """Runs a graph and compares the fake value of every node with the true one; a symbol means one number."""

    def __init__(self, gm):
        super().__init__(gm)
        self.sizes = {}

    def run_node(self, node):
        result = super().run_node(node)
        if node.op in ("placeholder", "call_function", "call_method"):
            expected = node.meta.get("example_value")
            if _name(node).startswith("zipvl.") and not _name(node).startswith("zipvl.append"):
                assert expected is not None, f"{node} has no example_value"
            self._compare(node, expected, result)
        return result

    def _compare(self, node, expected, result):
        if isinstance(expected, (tuple, list)) and isinstance(result, (tuple, list)):
            for fake, true in zip(expected, result, strict=True):
                self._compare(node, fake, true)
        elif isinstance(expected, FakeTensor):
            assert expected.dtype == result.dtype and expected.dim() == result.dim(), f"{node}: {expected}"
            for size, true in zip(expected.shape, result.shape, strict=True):
                assert self._value(size, true) == true, f"{node}: fake {expected.shape}, true {result.shape}"
            # Of a size-1 axis the stride means nothing.
            fake_order = [self._value(s, t) for s, t in zip(expected.stride(), result.stride(), strict=True)]
            pairs = zip(fake_order, result.stride(), result.shape, strict=True)
            if _name(node).startswith("zipvl.") and 0 not in result.shape:
                assert all(fake == true for fake, true, size in pairs if size > 1), f"{node}: strides"
        elif isinstance(expected, torch.SymInt):
            assert self._value(expected, result) == result, f"{node}"

    def _value(self, size, true):
        if isinstance(size, int):
            return size
        expression = size.node.expr.subs(self.sizes)
        if isinstance(expression, sympy.Symbol):
            self.sizes[expression] = true
            return true
        return int(expression) if expression.is_number else true


class Recorder:
    """A Dynamo backend: run the passes, note what they changed, check the graph, execute it checked."""

    def __init__(self, selection, inner, prune):
        self.selection, self.inner, self.prune = selection, inner, prune
        self.pruned, self.demands = [], []
        self.reports, self.graphs, self.erased, self.added = [], [], [], []

    def __call__(self, gm, example_inputs):
        fake_mode = detect_fake_mode([node.meta.get("example_value") for node in gm.graph.nodes])
        if fake_mode is not None and fake_mode.shape_env is not None:
            env = fake_mode.shape_env
            env.settings = dataclasses.replace(env.settings, allow_dynamic_output_shape_ops=True)
        before, returned = _nodes(gm.graph), _returned_inputs(gm.graph)
        if self.selection is not None:
            reports = [sparsify_prefill.apply(gm.graph, **self.selection), read_compact_cache.apply(gm.graph)]
            between = _nodes(gm.graph)
            reports.append(leave_dense.apply(gm.graph))
            assert list(between) == list(_nodes(gm.graph)), "leave_dense must change nothing"
            if self.prune:
                self.demands += demand_rows.apply(gm.graph).demands
                self.pruned += prune_projections.apply(gm.graph).pruned
            self.reports.append({report.name: report.sites for report in reports})
        gm.graph.lint()
        after = _nodes(gm.graph)
        self.erased.append(Counter(name for node, name in before.items() if node not in after))
        self.added.append(Counter(name for node, name in after.items() if node not in before))
        assert _returned_inputs(gm.graph) <= returned, "a rewrite must not return an input of the graph"
        gm.recompile()
        self.graphs.append(gm.graph)
        if self.inner is not None:
            return torch._dynamo.lookup_backend(self.inner)(gm, example_inputs)

        return lambda *inputs: CheckedRun(gm).run(*inputs)


def outcomes(recorder, graph=0):
    """Return kind and reason of every site, in the order of the passes."""
    return [(s.kind, s.reason) for sites in recorder.reports[graph].values() for s in sites]
