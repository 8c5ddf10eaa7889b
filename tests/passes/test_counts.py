"""What the rewritten graph computes and writes, counted: multiplications of projections, and bytes of its tensors.

The counts come from running the graphs of a small Llama; they do not depend on the machine.
"""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from zipvl_compile import backend

HIDDEN, MLP, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 8, 2, 3, 50
DIM, PROBES = HIDDEN // HEADS, 128
PROJECTIONS = {"q": HIDDEN * HIDDEN, "k": HIDDEN * KV_HEADS * DIM, "v": HIDDEN * KV_HEADS * DIM, "o": HIDDEN * HIDDEN}


class Sizes(torch.fx.Interpreter):
    """Notes the shape of every tensor that a graph makes, and the bytes of those that are no views."""

    def __init__(self, gm):
        super().__init__(gm)
        self.shapes, self.bytes = Counter(), 0

    def run_node(self, node):
        result = super().run_node(node)
        if node.op in ("call_function", "call_method"):
            inputs = {x.untyped_storage().data_ptr() for x in self.env.values() if isinstance(x, torch.Tensor)}
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in inputs:
                    self.shapes[tuple(x.shape)] += 1
                    self.bytes += x.untyped_storage().nbytes()
        return result


@pytest.fixture
def prefill(monkeypatch):
    """Return `prefill(n, **options)`: FLOPs of matrix products outside our operators, and the sizes of the tensors."""
    seen = []

    def compile_and_count(gm, inputs, options, records=True):
        def run(*inputs):
            sizes = Sizes(gm)
            with FlopCounterMode(display=False) as flops:
                result = sizes.run(*inputs)
            # A bmm is the rotary embedding's, in the transformers releases that compute it by a product.
            counts = flops.get_flop_counts()["Global"]
            seen.append((sum(count for op, count in counts.items() if op != torch.ops.aten.bmm), sizes))
            return result

        return run

    monkeypatch.setattr(backend, "_compile", compile_and_count)

    def count(n, batch=1, **options):
        torch._dynamo.reset()
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        model.compile(backend="zipvl", options={"policy": "paper", "min_tokens": 0} | options)
        mask = torch.ones(batch, n, dtype=torch.long)
        mask[-1, 0] = batch == 1  # a batch is padded, so that transformers makes a mask
        with torch.no_grad():
            model(input_ids=torch.zeros(batch, n, dtype=torch.long), attention_mask=mask, logits_to_keep=1)
        ((flops, sizes),) = seen
        seen.clear()
        return flops, sizes

    yield count
    torch._dynamo.reset()


def expected(n, p, rows, probes=PROBES):
    """Return FLOPs of a prefill: `rows` tokens of q, k, v and o in every layer but the last, `p` of v in the last."""
    mlp, head = 3 * HIDDEN * MLP, HIDDEN * VOCAB
    last = {"q": max(probes, 1), "k": n, "v": p, "o": 1}  # the demanded query is the last probe row
    layers = sum(PROJECTIONS[name] * ((LAYERS - 1) * rows[name] + last[name]) for name in PROJECTIONS)
    return 2 * (layers + mlp * ((LAYERS - 1) * n + 1) + head)


@pytest.mark.parametrize("n", [400, 800])
@pytest.mark.parametrize("ratio", [0.1, 0.25])
def test_projections_of_q_v_and_output_scale_with_the_kept_tokens(prefill, n, ratio):
    p = int(n * ratio)
    flops, _ = prefill(n, keep_ratio=ratio)
    assert flops == expected(n, p, {"q": PROBES + p, "k": n, "v": p, "o": p})


def test_a_prompt_that_stays_dense_gains_in_the_last_layer(prefill):
    n = 400
    flops, _ = prefill(n, min_tokens=n + 1)
    assert flops == expected(n, n, dict.fromkeys(PROJECTIONS, n), probes=0)


def test_no_other_work_than_dense_where_every_query_attends(prefill):
    n, p = 400, 100
    flops, _ = prefill(n, keep_ratio=0.25, unselected="all")
    assert flops == expected(n, p, {"q": n, "k": n, "v": p, "o": n})


@pytest.mark.parametrize("batch", [1, 2])
def test_no_full_copies_of_queries_or_repeated_keys_and_no_square_mask(prefill, batch):
    n, p = 400, 100
    _, sizes = prefill(n, batch=batch, keep_ratio=0.25)
    full = {(batch, HEADS, n, DIM), (batch, n, HEADS, DIM), (batch, KV_HEADS, HEADS // KV_HEADS, n, DIM)}
    assert full.isdisjoint(sizes.shapes), "queries of every token, or keys of repeated heads"
    assert (batch, HEADS, p, DIM) in sizes.shapes and (batch, HEADS, PROBES, DIM) in sizes.shapes
    square = [shape for shape in sizes.shapes if shape[-2:] == (n, n)]
    assert not square


def test_fewer_bytes_than_dense(prefill):
    n = 400
    _, dense = prefill(n, min_tokens=n + 1)
    _, sparse = prefill(n, keep_ratio=0.25)
    assert sparse.bytes < 0.85 * dense.bytes  # whose last layer computes the last row only, too
