"""What the frames that call a graph read of its hidden state; Dynamo compiles again for others that read more."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zipvl_compile.callers import COUNTS, attention_switch, decoder_layers, newest_rows_read
from zipvl_compile.dynamo import recompile_unless


class Decoder(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x * 2


class Model(nn.Module):
    """A decoder and a head with a graph break between them."""

    def __init__(self):
        super().__init__()
        self.model = Decoder()

    def forward(self, x, logits_to_keep=0):
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return self.model(x)[:, rows]


@pytest.fixture
def compiled():
    """Return a compiled model, and what each graph of its decoder was told."""
    torch._dynamo.reset()
    told = []

    def backend(gm, inputs):
        if any("mul" in str(node.target) for node in gm.graph.nodes):
            told.append(newest_rows_read())
        return gm.forward

    model = Model()
    model.compile(backend=backend)
    yield model, told
    torch._dynamo.reset()


@pytest.mark.parametrize("count, told", [(1, 1), (2, 16), (16, 16), (17, 64), (200, 256), (257, 0), (0, 0)])
def test_how_many_rows_are_read(compiled, count, told):
    model, found = compiled
    x = torch.randn(1, 300)
    assert torch.equal(model(x, logits_to_keep=count), 2 * x[:, -count:])
    assert found == [told]


@pytest.mark.parametrize("rows", [torch.tensor([3, 4]), slice(1, None)], ids=["tensor", "slice"])
def test_rows_that_are_no_number_are_all(compiled, rows):
    model, found = compiled
    x = torch.randn(1, 9)
    assert torch.equal(model(x, logits_to_keep=rows), 2 * x[:, rows]) and found == [0]


def test_another_graph_for_callers_that_read_others_and_no_more(compiled):
    model, found = compiled
    x = torch.randn(1, 300)
    for count in (1, 1, 5, 0, 1, 7, 9, 0, 300):
        assert torch.equal(model(x, logits_to_keep=count), 2 * x[:, -count:])
    assert found == [1, 16, 0]


def test_who_says_nothing_reads_everything(compiled):
    model, found = compiled
    model.model.compile(backend=_telling(found))
    logits_to_keep = 1  # of a function that is no forward
    assert torch.equal(model.model(torch.ones(1, 3)), torch.full((1, 3), 2.0)) and logits_to_keep
    assert found == [0]


def _telling(found):
    def backend(gm, inputs):
        found.append(newest_rows_read())
        return gm.forward

    return backend


def test_where_nothing_is_traced_nobody_can_be_asked():
    def forward(logits_to_keep):
        return newest_rows_read()

    assert forward(1) == 0 and not recompile_unless(lambda: True, "")
    assert [*COUNTS] == sorted(COUNTS) and COUNTS[0] == 1, "greedy decoding keeps the paper's rule"


class Config:
    def __init__(self, layers):
        self.layers = layers

    def get_text_config(self):
        if self.layers == "several":
            raise ValueError("several")
        return SimpleNamespace(num_hidden_layers=self.layers)


@pytest.mark.parametrize(("layers", "told"), [(7, 7), ("seven", None), ("several", None)])
def test_the_innermost_module_with_a_config_knows_the_layers(layers, told):
    class Outer(nn.Module):
        config = Config(99)

        def forward(self):
            return Inner()()

    class Inner(nn.Module):
        config = Config(layers)

        def forward(self):
            return Decoder.told(nn.Identity())

    class Decoder:
        def told(self):
            return decoder_layers()

    assert Outer()() == told and decoder_layers() is None


class Switched(nn.Module):
    def __init__(self, switch, inner=None):
        super().__init__()
        self.config, self.inner = SimpleNamespace(_attn_implementation=switch), inner

    def forward(self):
        return attention_switch() if self.inner is None else self.inner()


def test_the_attention_switch_is_that_of_the_innermost_model_that_has_one():
    assert attention_switch() is None
    assert Switched("sdpa", Switched("eager"))() == "eager"
    assert Switched("sdpa", Switched(None))() == "sdpa"
