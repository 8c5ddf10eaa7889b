"""What compilers make of the kernels, without a GPU: machine code for every target, and one graph with the model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACE = """
import torch, triton
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses import FakeTensorMode
from functorch.compile import make_boxed_func
from triton.backends.compiler import GPUTarget
from zipvl_compile.kernels.ops import ops
from zipvl_compile.kernels import append_tokens, decode_attention, decode_quantised, token_scores

class Driver:  # Inductor asks which GPU there is, to see what a kernel writes
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)

triton.runtime.driver.set_active(Driver())

class Step(torch.nn.Module):
    def forward(self, q, keys, values, k, v, positions, mask):
        ops.append_tokens(keys, values, k, v, 17)
        return (ops.decode_attention(q, keys, values, positions, 32, 40, mask, None, None),)

class Coded(torch.nn.Module):
    def forward(self, q, keys, values, positions, mask, *codes):
        return (ops.decode_quantised(q, keys, values, positions, 32, 40, *codes, mask, None, None),)

class Scores(torch.nn.Module):
    def forward(self, q, k, mask):
        return ops.token_scores(q, k, mask, True, None, None, 64, 64, 0, 1)

def show(graph, inputs):
    for node in graph.graph.nodes:
        if node.op == "call_function":
            print(node.target, sorted(node.kwargs.get("tensors_to_clone", [])))
            if "COMPACT" in node.kwargs.get("kwargs", ()):
                print("COMPACT", node.kwargs["kwargs"]["COMPACT"])
    return make_boxed_func(graph.forward)

with FakeTensorMode(), torch.no_grad():
    def new(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, device="cuda", dtype=dtype)
    inputs = (new(2, 8, 1, 64), new(2, 2, 64, 64), new(2, 2, 64, 64), new(2, 2, 1, 64), new(2, 2, 1, 64),
              new(2, 1, 10, dtype=torch.int64), new(2, 1, 1, 40, dtype=torch.bool))
    aot_module_simplified(Step(), inputs, fw_compiler=show)
    print("quantised")
    codes = (new(2, 2, 64, 32, dtype=torch.uint8), new(2, 2, 1, 64, 2), new(2, 2, 64, 16, dtype=torch.uint8),
             new(2, 2, 64, 1, 2))
    for mask in (None, inputs[6]):
        aot_module_simplified(Coded(), (*inputs[:3], inputs[5], mask, *codes), fw_compiler=show)
    for given in (500, 128):
        print("scores")
        inputs = new(2, 8, given, 64), new(2, 2, 500, 64), new(2, 1, 1, 500, dtype=torch.bool)
        aot_module_simplified(Scores(), inputs, fw_compiler=show)
"""


def python(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_and_fits():
    done = python("benchmarks/kernel_resources.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " 0 failed" in done.stdout


@pytest.fixture(scope="module")
def traced():
    """What the tests below read: the calls of the graphs of two decode steps, and of two scorings."""
    done = python("-c", TRACE)
    assert done.returncode == 0, done.stderr[-3000:]
    return [graph.splitlines() for graph in re.split("(?:scores|quantised)\n", done.stdout)]


def launches(graph):
    return [line.split(" ", 1)[1] for line in graph if line.startswith("triton_kernel_wrapper")]


def test_decoding_on_a_gpu_is_kernels_in_the_graph_that_copy_no_cache(traced):
    # What a launch may write; the cache is written by the append alone.
    assert launches(traced[0]) == ["['keys', 'values']", "['partial', 'tops', 'totals']", "['out']"], traced[0]
    assert "zipvl" not in str(traced[0]), "no operator is left for Python to dispatch"


def test_decoding_from_codes_on_a_gpu_is_kernels_that_share_a_join(traced):
    written = "['partial', 'tops', 'totals']"
    assert launches(traced[1]) == [written, written, "['out']"] * 2, traced[1]
    # What a mask says of the others asks where they stand.
    assert [line for line in traced[1] if "zipvl" in line] == ["zipvl.other_tokens.default []"]


def test_scoring_on_a_gpu_is_kernels_in_the_graph(traced):
    for graph, narrow in zip(traced[2:], (False, True), strict=True):
        assert launches(graph) == ["['maxima', 'sums']", "['norms']", "['out']"], graph
        assert {line.split(" ", 1)[0] for line in graph if "zipvl" in line} == {"zipvl.probe_positions.default"}
        # Whether the queries are those of the probe rows.
        assert [line for line in graph if line.startswith("COMPACT")] == [f"COMPACT {narrow}"] * 2
