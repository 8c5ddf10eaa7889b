"""What measures attention in a later part of a prompt, and the mask over what is in memory."""

import pytest
import torch
from torch.fx import Graph, GraphModule

from zipvl_compile.passes.prefill.later_part import in_memory, newest, newest_row
from zipvl_compile.passes.settings import Settings


@pytest.mark.parametrize(
    ("probes", "least", "rows"), [((64, 64), 128, 128), ((3, 0), 128, 3), ((64, 200), 128, 128), ((64, 200), 512, 264)]
)
def test_the_newest_rows_measure(probes, least, rows):
    recent, drawn = probes
    assert newest(Settings(recent_probes=recent, random_probes=drawn, reselect_tokens=least)) == rows


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_newest_row_of_a_mask_over_what_is_in_memory(batch, heads):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(batch, heads, 4, 9, generator=generator)
    places = torch.stack([torch.tensor([0, 2, 3, 8]), torch.tensor([1, 4, 5, 6])])[:, None]
    graph = Graph()
    inputs = [graph.placeholder(name) for name in ("mask", "places")]
    for node, value in zip(inputs, (mask, places), strict=True):
        node.meta["example_value"] = value
    output = graph.output(None)
    row = in_memory(newest_row(inputs[0], Settings(recent_probes=2, random_probes=0), output), inputs[1], output)
    output.args = (row,)
    got = GraphModule({}, graph)(mask, places)
    expected = torch.stack([mask[b % batch, :, 2:].amax(1, keepdim=True)[..., places[b, 0]] for b in range(2)])
    assert torch.equal(got, expected)
    assert newest_row(None, Settings(), output) is None and in_memory(None, inputs[1], output) is None
