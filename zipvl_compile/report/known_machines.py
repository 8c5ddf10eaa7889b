"""Speeds of machines that were measured before, for where measuring fails: out of memory, a kernel that does not run.

The cost model compares dense with sparse attention on one machine, so what matters is how the numbers of a row relate.
"""

from __future__ import annotations

import torch

from zipvl_compile.passes.cost_model import Machine

# One thread of an Intel Xeon (2 cores) with PyTorch 2.13, float32: `report/machine.py` with the fastest of 25 rounds,
# median of three runs.
CPU = Machine(
    attend=2.3e-11, edge=7.9e-9, multiply=1.7e-11, score=2.9e-9, token=2.6e-7, byte=3.0e-10, site=1.8e-3, masked=1.0
)

# NVIDIA H100 80GB, bfloat16, from benchmarks/results/gpu.jsonl (40 heads of 128):
#   attend, edge  cuDNN attention, 0.3207 ms at 4096 tokens and 1.1246 ms at 8192, through a quadratic
#   product       8 layers of a 13B at 4096 tokens without attention, 33.9 ms for 8 * 317e6 * 4096 multiply-adds
#   multiply      the same, for want of a measurement; only its sum with `score` matters at this head_dim
#   score         128 probe rows, 0.2432 ms at 16384 tokens and 0.8136 ms at 65536, less the multiply-adds
#   token         selection by keep_ratio, 0.0595 ms at 16384 tokens
#   byte          gather of K, 0.0472 ms for 62 MB
#   site          scores, selection and gather of no token, through their times at two lengths: 60 + 7 + 6 us
#   host          0.566 ms for scores, selection and gather, 0.203 ms for attention, less 0.067 ms for dense attention
#   masked        dense prefill with and without a mask in memory, 16384 tokens: 119 ms over 34 ms of attention
H100 = Machine(
    attend=2.8e-15, edge=3.8e-12, multiply=3.3e-15, score=1.85e-12, token=3.6e-9, byte=7.6e-13, site=7.3e-5,
    host=7.0e-4, product=3.3e-15, masked=3.5,
)  # fmt: skip


def known_machine(device: torch.device) -> Machine:
    """Return the speed of the measured machine that is most like a device: of a GPU, whichever it is, or of a CPU."""
    return H100 if device.type == "cuda" else CPU
