"""Calls in place that become others: where nobody can tell, and the near misses."""

import pytest
import torch

from zipvl_compile.passes.graph import out_of_place
from zipvl_compile.passes.graph.reading import written


def top(x):
    values, ids = torch.topk(x, 3, dim=-1)
    values /= values.sum(-1, keepdim=True)
    return values, ids


def mask(x):
    chosen = torch.zeros_like(x)
    chosen.scatter_(1, x.argmax(-1, keepdim=True), 1)
    return chosen.unsqueeze(0) * x


def twice(x):
    y = x * 2
    y.add_(1).mul_(3)
    y -= x
    return y


def by_another_name(x):
    y = (x * 2).to(x.dtype)  # the same tensor
    y += 1
    return y * 3


def of_an_input(x):
    x += 1
    return x * 2


def of_a_view(x):
    y = x * 2
    y[0].add_(1)
    return y


def seen_through_a_view(x):
    y = x * 2
    first = y[0]
    y += 1
    return first, y


def read_by_its_first_name(x):
    y = x * 2
    z = y.to(x.dtype)
    z += 1
    return y, z


def an_input_by_another_name(x):
    y = x.to(x.dtype)
    y += 1
    return y * 2


def of_another_dtype(x):
    y = torch.zeros_like(x)
    y += 1
    z = x.to(torch.float32) * 2
    z *= torch.ones_like(x)
    return y, z


OWN = {"the values of topk": top, "a mask": mask, "several in a row": twice, "another name": by_another_name}
SEEN = {
    "an input": of_an_input,
    "a view": of_a_view,
    "a view of before": seen_through_a_view,
    "its first name": read_by_its_first_name,
    "another name of an input": an_input_by_another_name,
}


def rewritten(function):
    """Return how many calls write before and after, and what the graph gives, on a tensor of its own."""
    torch._dynamo.reset()
    graphs = []

    def backend(gm, _):
        count = sum(bool(written(node)) for node in gm.graph.nodes)
        out_of_place.rewrite(list(gm.graph.nodes))
        gm.graph.lint()
        gm.recompile()
        graphs.append((count, sum(bool(written(node)) for node in gm.graph.nodes)))
        return gm.forward

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given, expected = x.clone(), x.clone()
    got, want = torch.compile(function, backend=backend, fullgraph=True)(given), function(expected)
    torch.testing.assert_close((got, given), (want, expected), rtol=0, atol=0)
    return graphs[0]


@pytest.mark.parametrize("name", OWN)
def test_what_nobody_can_tell(name):
    before, after = rewritten(OWN[name])
    assert before > 0 and after == 0


@pytest.mark.parametrize("name", SEEN)
def test_what_is_seen_elsewhere_stays(name):
    before, after = rewritten(SEEN[name])
    assert before == after > 0


def test_a_result_of_another_dtype_stays():
    before, after = rewritten(of_another_dtype)
    assert before == 2 and after == 1, "float32 times float64 is float64, but not in place"
