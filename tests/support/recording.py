"""A backend that runs passes over a Dynamo graph, records what changed, and executes it node by node."""

import dataclasses
import functools
from collections import Counter

import sympy
import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from zipvl_compile.pipeline import rewrite, without

SELECTION = {"tau": 0.8, "recent_probes": 6, "random_probes": 6, "seed": 3, "min_tokens": 0}
# The rest of the pipeline changes neither what is computed nor which attention reads it.
PRUNING = ("keep_true_rows", "demand_rows", "prune_projections")
LATER = ("unmask_dense", "keep_every_token", "fuse_gathers", "choose_kernels")


@dataclasses.dataclass(frozen=True)
class Noted:
    """What a site's outcome says: its layer, its kind, and why it stays dense, or an empty string."""

    layer: str
    kind: str
    reason: str = ""

    @property
    def rewritten(self):
        return not self.reason


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
    """A Dynamo backend: run the passes, note what they changed, check the graph, execute it checked.

    The newest row alone counts as read, whatever the graph returns, unless `read` runs the pass that looks.
    """

    def __init__(self, settings, inner, prune, passes=None, read=False):
        self.settings, self.inner = settings, inner
        skipped = (() if prune else PRUNING) + (() if read else ("read_demands",))
        self.passes = passes or without(*LATER, *skipped)
        self.sites, self.graphs, self.erased, self.added, self.faults = [], [], [], [], []

    @property
    def pruned(self):
        return [pruning for sites in self.sites for pruning in sites.pruned]

    @property
    def demands(self):
        return [demand for sites in self.sites for demand in sites.demands]

    def noted(self, which="outcomes", graph=0):
        """Return the outcomes of all sites of a graph, or of its "prefill", "decode" or "others" only."""
        sites = self.sites[graph]
        found = sites.outcomes if which == "outcomes" else [site.outcome for site in getattr(sites, which)]
        found += sites.unread if which == "others" else []
        return [Noted(one.layer, one.kind, str(one.reason or "")) for one in found]

    def __call__(self, gm, example_inputs):
        with_unknown_sizes(gm)
        before, returned = _nodes(gm.graph), _returned_inputs(gm.graph)
        if self.settings is not None:
            done = rewrite(gm.graph, self.settings, self.passes)
            assert not done.faults, done.faults
            self.sites.append(done.sites)
        gm.graph.lint()
        after = _nodes(gm.graph)
        self.erased.append(Counter(name for node, name in before.items() if node not in after))
        self.added.append(Counter(name for node, name in after.items() if node not in before))
        assert _returned_inputs(gm.graph) <= returned, "a rewrite must not return an input of the graph"
        gm.recompile()
        self.graphs.append(gm.graph)
        if self.inner is not None:
            return torch._dynamo.lookup_backend(self.inner)(gm, example_inputs)

        return functools.partial(run_checked, gm)


def with_unknown_sizes(gm):
    """Allow sizes in a graph that only the running graph knows."""
    fake_mode = detect_fake_mode([node.meta.get("example_value") for node in gm.graph.nodes])
    if fake_mode is not None and fake_mode.shape_env is not None:
        env = fake_mode.shape_env
        env.settings = dataclasses.replace(env.settings, allow_dynamic_output_shape_ops=True)


def run_checked(gm, *inputs):
    """Run a graph node by node, every fake value compared with the true one."""
    return CheckedRun(gm).run(*inputs)


def outcomes(recorder, which="outcomes", graph=0):
    """Return kind and reason of every site, or of the "prefill", "decode" or "others" only."""
    return [(one.kind, one.reason) for one in recorder.noted(which, graph)]
