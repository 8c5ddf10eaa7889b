"""decode_quantised of CPUs: one operator, or operations of a compiled graph, which give the same."""

import pytest
import torch
from support.quantised import cache
from torch._dynamo.testing import CompileCounterWithBackend

from zipvl_compile.kernels import decode_quantised_torch as module
from zipvl_compile.kernels.common import codes as common
from zipvl_compile.kernels.common.codes import BITS, GROUP, dequantised
from zipvl_compile.kernels.decode_quantised_torch import check, decode_in_graph
from zipvl_compile.kernels.ops import ops

MASKS = ["none", "row", "rows", "heads", "min", "inf"]


@pytest.fixture(autouse=True)
def nothing_from_disk():
    """PyTorch's caches know an operator by its name, whatever it was when they were written."""
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def arguments(**shape):
    """Return what the operator takes, in order; what a graph multiplies by zero is finite."""
    given = cache(**{"value_dim": 16} | shape).given
    given["value_scales"] = given["value_scales"].nan_to_num(9.0)
    return (*given.values(), 0.4, None)


def step(*given):
    return ops.decode_quantised(*given)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_a_graph_computes_what_the_operator_does(mask, m, groups):
    given = arguments(groups=groups, m=m, mask=mask, value_bits=2, dtype=torch.float32)
    torch._dynamo.reset()
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(got, ops.decode_quantised_torch(*given), rtol=4e-6, atol=4e-6)
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("others", [0, 1, 64, 65])
@pytest.mark.parametrize("bits", BITS)
def test_every_width_and_number_of_others(bits, others):
    given = arguments(others=others, key_bits=bits, value_bits=bits, mask="row")
    expected = ops.decode_quantised_torch(*given)
    torch.testing.assert_close(decode_in_graph(*given[:-1]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden", ["others", "cached", "all"])
def test_a_graph_may_hide_all_of_a_kind(hidden):
    *given, _, scale, _ = arguments()
    positions, prompt, n = given[3:6]
    cached = torch.zeros(2, n, dtype=torch.bool).scatter_(1, positions[:, 0], True)
    cached[:, prompt:] = True
    shown = {"others": cached, "cached": ~cached, "all": torch.zeros_like(cached)}[hidden][:, None, None]
    got = decode_in_graph(*given, shown, scale)
    torch.testing.assert_close(got, ops.decode_quantised_torch(*given, shown, scale, None), rtol=1e-12, atol=1e-12)
    assert got.any() == (hidden != "all")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["none", "heads"])
def test_inductor_compiles_it_once_for_all_lengths(mask, dtype):
    """Once for the first length, once for all, as steps of a model are."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 100 * torch.finfo(dtype).eps}
    for kept, others, later in ((20, 250, 3), (40, 350, 5), (50, 450, 8), (60, 512, 11)):
        given = arguments(kept=kept, others=others, later=later, mask=mask, dtype=dtype)
        torch.testing.assert_close(compiled(*given), ops.decode_quantised_torch(*given), **tolerance)
    assert counter.frame_count == 2


def traced(given):
    """Return the operators in the graph of a step."""
    found = []

    def show(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    torch.compile(step, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=show), fullgraph=True)(*given)
    return found


def test_one_new_token_is_operations_of_the_graph_and_more_are_one_operator():
    assert not any("zipvl" in name for name in traced(arguments(dtype=torch.float32)))
    for given in (arguments(m=3), (*arguments()[:-1], 3.0), arguments(value_dim=24)):  # more queries; a softcap; widths
        assert [name for name in traced(given) if "zipvl" in name] == ["zipvl.decode_quantised_torch.default"]


def test_a_few_groups_are_dequantised_at_a_time(monkeypatch):
    """What is alive at once is bounded, and how much does not change the result."""
    given, sizes = arguments(others=300), []
    expected = ops.decode_quantised_torch(*given)

    def noted(codes, scales, width):
        sizes.append(codes.shape[2])
        return dequantised(codes, scales, width)

    monkeypatch.setattr(common, "MOST", 2 * 2 * 16 * GROUP)
    monkeypatch.setattr(common, "dequantised", noted)
    torch.testing.assert_close(ops.decode_quantised_torch(*given), expected, rtol=1e-12, atol=1e-12)
    assert sizes == [GROUP] * 2 * 5


def test_positions_of_others_are_looked_up_for_a_mask_only(monkeypatch):
    monkeypatch.setattr(module, "other_tokens", lambda *given: pytest.fail("looked up"))
    ops.decode_quantised_torch(*arguments())
    decode_in_graph(*arguments()[:-1])
    with pytest.raises(pytest.fail.Exception):
        ops.decode_quantised_torch(*arguments(mask="row"))


def test_arguments_are_checked():
    given = cache().given
    check(**given)
    with pytest.raises(ValueError, match="key_codes: expected batch, heads and tokens"):
        check(**(given | {"key_codes": given["key_codes"][:, :, :64]}))
