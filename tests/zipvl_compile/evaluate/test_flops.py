"""FLOPs, counted by hand on tiny shapes."""

import pytest
import torch
import torch.nn.functional as F
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llama import VOCAB, model, prompt

from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.evaluate.compiled import compiled_for
from zipvl_compile.evaluate.flops import FORMULAS, FREE, CountedFlops, visible_pairs
from zipvl_compile.kernels.ops import OPERATORS, ops

HEADS, KV_HEADS, N, D, DV = 4, 2, 6, 8, 16
KEPT = torch.tensor([[[0, 2, 5]]])


def qkv(n=N, m=N):
    return torch.randn(1, HEADS, m, D), torch.randn(1, KV_HEADS, n, D), torch.randn(1, KV_HEADS, n, DV)


def counted(run):
    with CountedFlops() as flops:
        run()
    return flops.total


def test_a_matrix_product_is_two_operations_for_each_multiplication():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert counted(lambda: a @ b) == counted(lambda: F.linear(a, b.T)) == 2 * 3 * 4 * 5
    assert counted(lambda: torch.randn(2, 3, 4) @ torch.randn(2, 4, 5)) == 2 * 2 * 3 * 4 * 5
    assert counted(lambda: torch.softmax(a, 1) + a) == 0


@pytest.mark.parametrize(
    ("mask", "causal", "pairs"),
    [
        (None, False, 36),
        (None, True, 1 + 2 + 3 + 4 + 5 + 6),
        (torch.ones(N, N, dtype=torch.bool).tril().triu(-1), False, 1 + 5 * 2),  # a window of two
        (torch.zeros(1, 1, N, N).masked_fill(torch.eye(N) == 0, float("-inf")), False, 6),
        (torch.tensor([1, 1, 0, 0, 0, 0]).bool().expand(1, 1, 1, N), False, 6 * 2),
    ],
    ids=["all", "causal", "window", "additive", "padding"],
)
def test_attention_counts_what_is_visible(mask, causal, pairs):
    q, k, v = qkv()
    v = v[..., :D]  # the kernel of PyTorch on CPUs takes equal widths
    run = lambda: F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)  # noqa: E731
    assert counted(run) == pairs * HEADS * 2 * (D + D)


def test_scores_count_one_product_of_the_probe_rows():
    q, k, _ = qkv()
    # With two newest rows and no others, rows 4 and 5 see 5 and 6 keys.
    total = counted(lambda: ops.token_scores(q, k, None, True, None, None, 2, 0, 0, 1))
    assert total == (5 + 6) * HEADS * 2 * D
    assert counted(lambda: ops.token_scores(q[:, :, 4:], k, None, True, None, None, 2, 0, 0, 1)) == total


@pytest.mark.parametrize(
    ("queries", "hidden", "pairs"),
    [
        ("selected", None, 1 + 2 + 3),
        ("all", None, 1 + 1 + 2 + 2 + 2 + 3),  # row 5 sees 0, 2 and 5
        ("selected", 0, 0 + 1 + 2),  # token 0 is padding
        ("all", 0, 0 + 0 + 1 + 1 + 1 + 2),
    ],
)
def test_sparse_attention_counts_kept_pairs(queries, hidden, pairs):
    q, k, v = qkv()
    mask = None if hidden is None else (torch.arange(N) != hidden).expand(1, 1, 1, N)
    k, v = (ops.gather_tokens(x, KEPT, 2) for x in (k, v))  # with spare rows
    given = (k, v, KEPT, mask, True, None, None, queries)
    assert counted(lambda: ops.sparse_attention(q, *given)) == pairs * HEADS * 2 * (D + DV)
    if queries == "selected":
        kept_q = q[:, :, KEPT[0, 0]]
        assert counted(lambda: ops.sparse_attention(kept_q, *given)) == pairs * HEADS * 2 * (D + DV)


def test_decode_attention_counts_cached_tokens():
    q, _, _ = qkv(m=2)
    keys, values = torch.randn(1, KV_HEADS, 9, D), torch.randn(1, KV_HEADS, 9, DV)
    # Prompt of 6 with 3 kept, then 2 new tokens; the first new one does not see the second.
    mask = torch.ones(1, 1, 2, 8, dtype=torch.bool).tril(6)
    for given, pairs in ((None, 2 * 5), (mask, 4 + 5)):
        run = lambda given=given: ops.decode_attention(q, keys, values, KEPT, N, 8, given, None, None)  # noqa: E731
        assert counted(run) == pairs * HEADS * 2 * (D + DV)


def test_decode_quantised_counts_every_prompt_token():
    q, k, v = qkv(m=2)
    others = ops.other_tokens(KEPT, N)
    coded = *ops.quantise_tokens(k, others, 4, "channel"), *ops.quantise_tokens(v, others, 4, "token")
    buffers = torch.randn(1, KV_HEADS, 9, D), torch.randn(1, KV_HEADS, 9, DV)
    mask = torch.ones(1, 1, 2, 8, dtype=torch.bool).tril(6)
    for given, pairs in ((None, 2 * 8), (mask, 7 + 8)):
        run = lambda given=given: ops.decode_quantised(q, *buffers, KEPT, N, 8, *coded, given, None, None)  # noqa: E731
        assert counted(run) == pairs * HEADS * 2 * (D + DV)


@pytest.mark.parametrize(
    ("kept_window", "queries", "sinks", "pairs"),
    [
        # Rows 1, 3, 4 see two neighbours each, kept rows 1 + 2 + 3 kept keys.
        (False, "selected", 0, 6 + 2 + 2 + 2),
        # Row 1 sees 0 and 1; rows 3 and 4 see token 0 as well.
        (False, "selected", 1, 6 + 2 + 3 + 3),
        # Kept rows see the token before them, too, which is not kept: rows 2 and 5.
        (True, "selected", 0, 12 + 2),
        # 0 | 0 1 | 1 2 and 0 | 0 2 3 | 0 2 3 4 | 0 2 4 5
        (True, "all", 0, 1 + 2 + 3 + 3 + 4 + 4),
    ],
)
def test_window_attention_counts_neighbours_once(kept_window, queries, sinks, pairs):
    q, k, v = qkv()
    given = {"q": q, "k": k, "v": v, "positions": KEPT, "mask": None, "is_causal": True, "window": 2}
    given["dense_from"] = 1.0
    rule = {"sinks": sinks, "kept_window": kept_window, "queries": queries}
    assert FORMULAS["zipvl::window_attention"](given | rule) == pairs * HEADS * 2 * (D + DV)
    if queries == "all":
        last = given | rule | {"q": q[:, :, -2:]}
        assert FORMULAS["zipvl::window_attention"](last) == (4 + 4) * HEADS * 2 * (D + DV)
        for some, whole in ((given | rule, 21), (last, 4 + 4)):  # 3 of 6 tokens are kept
            found = FORMULAS["zipvl::window_attention"](some | {"dense_from": 0.5})
            assert found == whole * HEADS * 2 * (D + DV)


def test_heads_of_a_mask_count_one_by_one():
    rows = torch.arange(2)[None]
    mask = torch.tensor([[[True, False]], [[True, True]]])[None]  # two heads, one row for all
    assert visible_pairs(rows, rows, False, mask, 1, 2) == 2 * 1 + 2 * 2
    assert visible_pairs(rows, rows, True, mask, 3, 4) == 3 * 2 * (2 + 3)
    assert visible_pairs(rows, rows, True, mask[:0], 1, 1) == 3, "a mask of no samples hides nothing"


def test_every_operator_is_known():
    assert {f"zipvl::{name}" for name in OPERATORS} <= {
        *FORMULAS,
        *FREE,
        "zipvl::decode_attention_torch",
        "zipvl::decode_quantised_torch",
        "zipvl::probe_rows",
        "zipvl::token_scores_torch",
    }


def test_a_model_counts_as_by_hand_dense_and_compiled():
    llama, n, m, hidden, kv, mlp, width = model(), 40, 3, 64, 32, 128, 16
    layer = hidden * (2 * hidden + 2 * kv + 3 * mlp)  # q, o; k, v; gate, up, down
    by_hand = 2 * (n * 2 * layer + VOCAB * hidden + 2 * 4 * 2 * width * n * (n + 1) // 2)
    dense = counted(lambda: llama(input_ids=prompt(n), logits_to_keep=1))
    assert dense == by_hand
    # Every token is kept, and the last layer computes its MLP and output projection for the newest row only.
    compiled = compiled_for(llama, {"tau": 1.0})
    cache = cache_of(compiled(input_ids=prompt(n), logits_to_keep=1))
    scores = 2 * 2 * 4 * width * n * (n + 1) // 2  # every row is a probe row
    saved = 2 * (n - 1) * hidden * (hidden + 3 * mlp)
    assert counted(lambda: compiled(input_ids=prompt(n), logits_to_keep=1)) == dense + scores - saved
    step = {"input_ids": prompt(m, seed=1), **as_argument(cache)}
    pairs = (n + 1) + (n + 2) + (n + 3)
    compiled(input_ids=prompt(m, seed=1), **as_argument(cache_of(compiled(input_ids=prompt(n), logits_to_keep=1))))
    assert counted(lambda: compiled(**step)) == 2 * (m * (2 * layer + VOCAB * hidden) + 2 * 4 * 2 * width * pairs)
