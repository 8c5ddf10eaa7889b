"""Speeds of known machines, for where none can be measured, or none can be kept in a file.

The cost model compares dense with sparse attention on one machine, so what matters is how the numbers of a row relate.
One CPU and one GPU were measured; other GPUs are scaled from the latter by what their makers publish.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace

import torch

from zipvl_compile.passes.cost_model import Machine

# One thread of an Intel Xeon (2 cores) with PyTorch 2.13, float32: `report/machine.py` with the fastest of 25 rounds,
# median of three runs.
CPU = Machine(
    attend=2.3e-11, edge=7.9e-9, multiply=1.7e-11, score=2.9e-9, token=2.6e-7, byte=3.0e-10, site=1.8e-3,
    product=1.3e-11, masked=1.0,
)  # fmt: skip

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


@dataclass(frozen=True)
class Card:
    """What a maker publishes of a GPU.

    Attributes:
        half, single: dense matrix products in bf16 (fp16 where it has no bf16) and in fp32 (TFLOP/s, no sparsity).
        memory: bandwidth (GB/s).
        hopper: the fastest attention kernels are cuDNN's, which a mask costs most.
    """

    half: float
    single: float
    memory: float
    hopper: bool = False


#: By words of the name that CUDA gives; the row with most words that all occur holds.
CARDS: dict[str, Card] = {
    "H100": Card(989, 67, 3350, hopper=True),
    "H100 PCIe": Card(756, 51, 2000, hopper=True),
    "H100 NVL": Card(835, 60, 3900, hopper=True),
    "H200": Card(989, 67, 4800, hopper=True),
    "GH200": Card(989, 67, 4000, hopper=True),
    "H20": Card(148, 44, 4000, hopper=True),
    "H800": Card(989, 67, 3350, hopper=True),
    "B200": Card(2250, 75, 8000),
    "A100": Card(312, 19.5, 1555),
    "A100 80GB": Card(312, 19.5, 1935),
    "A800": Card(312, 19.5, 1935),
    "A40": Card(149.7, 37.4, 696),
    "A30": Card(165, 10.3, 933),
    "A10": Card(125, 31.2, 600),
    "A10G": Card(70, 35, 600),
    "L40S": Card(362, 91.6, 864),
    "L40": Card(181, 90.5, 864),
    "L4": Card(121, 30.3, 300),
    "T4": Card(65, 8.1, 320),
    "V100": Card(125, 15.7, 900),
    "RTX 3090": Card(71, 35.6, 936),
    "RTX 4090": Card(165.2, 82.6, 1008),
    "RTX 5090": Card(209.5, 104.8, 1792),
    "RTX A6000": Card(154.8, 38.7, 768),
    "RTX 6000 Ada": Card(364, 91.1, 960),
    "MI210": Card(181, 45.3, 1638),
    "MI300X": Card(1307, 163.4, 5300),
    "MI325X": Card(1307, 163.4, 6000),
}
#: Any other GPU, and a part of one (MIG): of the middle of this table.
GENERIC = Card(150, 30, 900)


def known_machine(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Machine:
    """Return the speed of the known machine that is most like a device: of a GPU by its name, or of a CPU."""
    if device.type != "cuda":
        return CPU
    name = ""
    with contextlib.suppress(Exception):  # no such device, or no driver
        name = torch.cuda.get_device_name(device)
    return scaled(card(name), dtype)


def card(name: str) -> Card:
    """Return what is published of a GPU; `GENERIC` of one that is not in the table."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    if "MIG" in words:
        return GENERIC
    fitting = [row for row in CARDS if words.issuperset(row.split())]
    return CARDS[max(fitting, key=lambda row: len(row.split()))] if fitting else GENERIC


def scaled(card: Card, dtype: torch.dtype) -> Machine:
    """Return the speed of the H100 in the proportions of another card: arithmetic by its peak, the rest by bandwidth.

    What the host and the launches take is the same. A mask in memory doubles dense attention at least, whose fastest
    kernels take none.
    """
    h100 = CARDS["H100"]
    work = h100.half / (card.half if dtype.itemsize <= 2 else card.single)
    moved = h100.memory / card.memory
    return replace(
        H100, attend=H100.attend * work, edge=H100.edge * work, multiply=H100.multiply * work,
        product=H100.product * work, score=H100.score * moved, token=H100.token * moved, byte=H100.byte * moved,
        masked=H100.masked if card.hopper and dtype.itemsize <= 2 else 1.0,
    )  # fmt: skip
