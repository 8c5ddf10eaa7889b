"""Bytes that two ranks sum in one prefill under tensor parallelism, counted, and what that means for a large model.

Counted: a Llama of 5 layers over two gloo ranks, every `all_reduce` of a prefill. On paper, from the sums of a layer: a
model shaped like one of 72B over 8 GPUs, by the formula of a ring, each rank sending 2 (r - 1) / r of what is summed,
at the bandwidth of its link alone: no latency, no overlap with computing. Its layers but the first two and the last sum
what the last but one of the five does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import KEEP_RATIO, SKIPPING, decoder, prefill, prompt, report
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS, HIDDEN, TOKENS, RANKS = 5, 512, 1024, 2
VARIANTS = {
    "dense": {"min_tokens": 1 << 20},
    "by default": {"keep_ratio": KEEP_RATIO},
    "paper": {"policy": "paper", "keep_ratio": KEEP_RATIO},
    "skip layers": SKIPPING,
}
PARTS = ("output projections", "MLPs", "scores")
# On paper: layers, hidden size, tokens, bytes of a number, ranks; one direction of a GPU's link, in bytes a second.
LARGE = {"layers": 80, "hidden": 8192, "tokens": 16384, "element": 2, "ranks": 8}
LINKS = {"NVLink 4": 450e9, "PCIe 5.0 x16": 63e9}


class Sums(TorchDispatchMode):
    """Adds up the bytes of sums over ranks: hidden states by what comes before them, all others as scores."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: list[int] = []
        self.scores = [0] * LAYERS

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "all_reduce" in str(func):
            summed = args[0].numel() * args[0].element_size()
            if args[0].shape[-1] == HIDDEN and args[0].is_floating_point():
                self.hidden.append(summed)
            else:
                self.scores[(len(self.hidden) - 1) // 2] += summed
        return func(*args, **(kwargs or {}))

    def by_part(self) -> dict[str, list[int]]:
        """Return bytes of each layer. After the embedding a layer sums its output projection, then its MLP."""
        _, *layers = self.hidden
        assert len(layers) == 2 * LAYERS, self.hidden
        return dict(zip(PARTS, (layers[::2], layers[1::2], self.scores), strict=True))


def worker(folder: Path) -> None:
    """Count, on one rank of those that torchrun starts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    for name, options in VARIANTS.items():
        torch._dynamo.reset()
        model = type(decoder()).from_pretrained(folder / "model", tp_plan="auto").eval()
        model.compile(backend="zipvl", options={"inner": "eager", "min_tokens": 0, **options})
        prefill(model, prompt(TOKENS))
        with Sums() as sums:
            prefill(model, prompt(TOKENS))
        found[name] = sums.by_part()
    if dist.get_rank() == 0:
        (folder / "bytes.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def seconds(summed: dict[str, list[int]], link: float) -> float:
    """Return how long the sums of the large model take, by the bytes that the layers of the small one sum."""
    wider = LARGE["hidden"] * LARGE["element"] / (HIDDEN * 4)
    whole = 0.0
    for part, (first, second, *_, middle, last) in summed.items():
        layers = first + second + (LARGE["layers"] - 3) * middle + last
        whole += layers * LARGE["tokens"] / TOKENS * (1 if part == "scores" else wider)
    return 2 * (LARGE["ranks"] - 1) / LARGE["ranks"] * whole / link


@pytest.mark.benchmark(group="collectives")
def test_bytes_through_collectives(benchmark, tmp_path):
    decoder(HIDDEN, LAYERS).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    benchmark.pedantic(lambda: subprocess.run([*command, __file__, tmp_path], check=True, timeout=600))
    found = json.loads((tmp_path / "bytes.json").read_text())
    dense = found["dense"]
    case = f"hidden {HIDDEN}, {LAYERS} layers, {TOKENS} tokens, {RANKS} ranks"
    for name, summed in found.items():
        bytes_of = {part: (sum(summed[part]), "bytes") for part in PARTS}
        shares = {part: (sum(summed[part]) / sum(dense[part]), "x") for part in PARTS[:2]}
        times = {link: (1e3 * seconds(summed, speed), "ms") for link, speed in LINKS.items()}
        report("collectives", "bytes of a prefill", case, name, **bytes_of)
        report("collectives", "share of dense", case, name, **shares)
        report("collectives", "on paper", case, name, **times)
    assert sum(found["paper"]["output projections"]) <= 0.45 * sum(dense["output projections"])


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
