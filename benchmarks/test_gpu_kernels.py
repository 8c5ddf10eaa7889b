"""The Triton kernels against the best that PyTorch has for the same work, on one GPU, in one run. `make gpu` runs it.

Nothing here runs on zeros, and each case first checks its result: a wrong kernel has no speed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import KEEP_RATIO, device_times, host_times, report
from torch.nn.attention import SDPBackend, sdpa_kernel

from zipvl_compile.kernels.decode_attention import decode_attention
from zipvl_compile.kernels.gather_tokens import gather_kv, gather_tokens
from zipvl_compile.kernels.select_tokens import select_tokens
from zipvl_compile.kernels.sparse_attention import _attend_triton, sparse_attention, tilings
from zipvl_compile.kernels.token_scores import token_scores
from zipvl_compile.kernels.window_attention import window_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HEADS, WIDTH = 40, 128  # LLaVA-1.5 and LLaVA-Next 13B
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def dense_backends(q, k, v) -> dict:
    """Return causal attention by every backend of PyTorch that takes the inputs."""
    found = {}
    for backend in BACKENDS:

        def run(backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        try:
            run()
        except RuntimeError:
            continue
        found[f"dense {backend.name.lower()}"] = run
    return found


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error < 1e-2, f"relative error {error:.3g}"


@pytest.mark.parametrize("p", [2048, 4096, 8192, 16384])
def test_sparse_attention(p):
    n = int(p / KEEP_RATIO)
    q, k, v = draw(1, HEADS, n, WIDTH), draw(1, HEADS, p, WIDTH, seed=1), draw(1, HEADS, p, WIDTH, seed=2)
    positions = torch.randperm(n, device="cuda")[:p].sort().values.repeat(1, 1, 1)
    kept = q[:, :, positions[0, 0]].contiguous()
    # With pruned projections, as by default, Q comes for the kept tokens only, token-major as models lay it out.
    narrow = kept.transpose(1, 2).contiguous().transpose(1, 2)
    dense = dense_backends(kept, k, v)
    expected = next(iter(dense.values()))()
    row = torch.ones(1, 1, 1, n, dtype=torch.bool, device="cuda")
    variants = dense | {
        "kept queries": lambda: sparse_attention(narrow, k, v, positions),
        "kept queries, padding": lambda: sparse_attention(narrow, k, v, positions, row),
        "all queries in and out": lambda: sparse_attention(q, k, v, positions),
    }
    for tiling in tilings(q, v, None):
        variants[f"triton {tiling}"] = lambda tiling=tiling: _attend_triton(
            narrow, k, v, positions, None, True, None, None, False, tiling
        )
    for name in variants:
        if name not in dense:
            result = variants[name]()
            if result.shape[2] == n:
                assert result.float().norm() < 1.01 * expected.float().norm(), "zeros between the kept rows"
                result = result[:, :, positions[0, 0]]
            same(result, expected)
    times, host = device_times(variants), host_times(variants)
    best = min(times[name] for name in dense)
    work = 2 * HEADS * p * p * WIDTH  # causal: half of 4 p^2 D a head
    for name, seconds in times.items():
        report("gpu", "sparse_attention", f"p {p}, n {n}, {HEADS} heads, head_dim {WIDTH}, bf16", name,
               time=(seconds * 1e3, "ms"), rate=(work / seconds / 1e12, "TFLOP/s"),
               flops_vs_best_dense=(best / seconds, "fraction"), host=(host[name] * 1e3, "ms"))  # fmt: skip


RULES = {
    "window": {},
    "kept and window": {"kept_window": True},
    "union": {"kept_window": True, "queries": "all"},
}


@pytest.mark.parametrize("ratio", [KEEP_RATIO, 0.55])
@pytest.mark.parametrize("n", [4096, 16384])
def test_window_attention(n, ratio):
    """Each rule against dense attention over the whole prompt, and against the share of pairs that it looks at."""
    p = int(n * ratio)
    q, k, v = (draw(1, HEADS, n, WIDTH, seed=i) for i in range(3))
    positions = torch.randperm(n, device="cuda")[:p].sort().values.repeat(1, 1, 1)
    given = (q, k, v, *gather_kv(k, v, positions, 64), positions, torch.ones(1, n, device="cuda"))
    variants = {
        f"{name}, {kernel}": lambda rule=rule, kernel=kernel: window_attention(*given, **rule, kernel=kernel)
        for name, rule in RULES.items()
        for kernel in ("triton", "auto")
    }
    for name in RULES:
        same(variants[f"{name}, triton"](), window_attention(*given, **RULES[name], kernel="torch"))
    dense = dense_backends(q, k, v)
    times = device_times(variants | dense)
    best = min(times[name] for name in dense)
    for name in variants:
        pairs = (n if name.startswith("union") else p) * p / 2 + 68 * n
        report("gpu", "window_attention", f"p {p}, n {n}, {HEADS} heads, head_dim {WIDTH}, bf16", name,
               time=(times[name] * 1e3, "ms"), share_of_dense_attention=(times[name] / best, "fraction"),
               share_of_bound=(pairs / (n * n / 2) / (times[name] / best), "fraction"))  # fmt: skip


@pytest.mark.parametrize("rule", [{"tau": 0.975}, {"keep_ratio": KEEP_RATIO}], ids=str)
@pytest.mark.parametrize("n", [4096, 16384, 65536])
def test_selection(n, rule):
    q, k, v = (draw(1, HEADS, n, WIDTH, seed=i) for i in range(3))
    k[:, :, :: n // 64] *= 3  # some tokens matter

    def select():
        positions = select_tokens(*token_scores(q, k), **rule)
        return gather_kv(k, v, positions, 64)

    scores = token_scores(q, k)
    positions = select_tokens(*scores, **rule)
    assert torch.equal(positions, select_tokens(*scores, **rule, kernel="torch"))
    same(scores[0], token_scores(q, k, kernel="torch")[0])
    parts = {
        "scores + selection + gather": select,
        "scores": lambda: token_scores(q, k),
        "selection": lambda: select_tokens(*scores, **rule),
        "gather": lambda: gather_kv(k, v, positions, 64),
        "gather of K only": lambda: gather_tokens(k, positions, 64),  # V of the other tokens is not computed
    }
    dense = dense_backends(q, k, v)
    times, host = device_times(parts | dense), host_times(parts)
    best = min(times[name] for name in dense)
    for name in parts:
        report("gpu", "selection", f"n {n}, {HEADS} heads, head_dim {WIDTH}, bf16, {rule}", name,
               time=(times[name] * 1e3, "ms"), share_of_dense_attention=(times[name] / best, "fraction"),
               host=(host[name] * 1e3, "ms"))  # fmt: skip


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 40), (8, 40), (8, 8)])
def test_decode_attention(batch, kv_heads):
    kept, prompt = 16384, 40000
    n = prompt + 100
    q = draw(batch, HEADS, 1, WIDTH)
    keys, values = (draw(batch, kv_heads, kept + 1000, WIDTH, seed=i) for i in (1, 2))
    positions = torch.arange(kept, device="cuda").repeat(batch, 1, 1)
    expected = decode_attention(q, keys, values, positions, prompt, n, kernel="torch")
    same(decode_attention(q, keys, values, positions, prompt, n, kernel="triton"), expected)
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    times = device_times({
        "triton": lambda: decode_attention(q, keys, values, positions, prompt, n, kernel="triton"),
        "torch": lambda: decode_attention(q, keys, values, positions, prompt, n, kernel="torch"),
        "copy": lambda: target.copy_(source),
    })  # fmt: skip
    copied = 2 * source.nbytes / times["copy"]
    read = 2 * batch * kv_heads * (kept + n - prompt) * WIDTH * 2
    case = f"batch {batch}, {HEADS} heads, {kv_heads} KV heads, {kept + n - prompt} cached tokens, bf16"
    for name in ("triton", "torch"):
        rate = read / times[name]
        report("gpu", "decode_attention", case, name, time=(times[name] * 1e3, "ms"),
               bandwidth=(rate / 1e12, "TB/s"), bandwidth_vs_copy=(rate / copied, "fraction"))  # fmt: skip
