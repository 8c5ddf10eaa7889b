"""Tokens drawn at random, the same in every layer, and the newest one."""

import torch
from support.policies import N, run
from support.quiet import one_thread_without_gradients  # noqa: F401

from zipvl_compile.kernels.probe_rows import shuffled_order
from zipvl_compile.policies.random_tokens import POLICY


def test_a_seeded_draw_and_the_newest_token():
    _, kept = run("random_tokens", keep_ratio=0.3)
    best = shuffled_order(torch.arange(N - 1), 0).argsort()[-29:]
    expected = sorted([*best.tolist(), N - 1])
    assert [positions.flatten().tolist() for positions in kept] == [expected] * 4
    _, other = run("random_tokens", keep_ratio=0.3, seed=1)
    assert other[0].flatten().tolist() != expected and POLICY.score == "random"
