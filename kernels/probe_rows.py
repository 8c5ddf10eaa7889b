"""The probe rows: whose attention is measured in the place of everyone's.

R is the `recent_probes` newest rows and `random_probes` rows drawn, seeded, from the others.

Source: ZipVL (arXiv 2410.08584), probe tokens.
"""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=512)
def cached_probe_rows(n: int, recent_probes: int, random_probes: int, seed: int, device: torch.device) -> torch.Tensor:
    """Return `probe_rows` on `device` without a copy: do not write to it.

    Once there, they cost no transfer, for which the host would wait for the device in every layer.
    """
    if device.type != "cpu":
        return cached_probe_rows(n, recent_probes, random_probes, seed, torch.device("cpu")).to(device)
    if n <= recent_probes + random_probes:
        return torch.arange(n)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(n - recent_probes, generator=generator)[:random_probes].sort().values
    return torch.cat([drawn, torch.arange(n - recent_probes, n)])


def probe_rows(n: int, recent_probes: int, random_probes: int, seed: int) -> torch.Tensor:
    """Return the probe rows of an `n`-token prompt: int64 `[min(n, recent_probes + random_probes)]`, ascending.

    Args:
        n: prompt length in tokens.
        recent_probes: newest rows that are always probes.
        random_probes: rows drawn without replacement from the rest.
        seed: of the draw; equal arguments give equal rows, on every device.
    """
    return cached_probe_rows(n, recent_probes, random_probes, seed, torch.device("cpu")).clone()


@torch.library.custom_op("zipvl::probe_positions", mutates_args=())
def _probe_positions(k: torch.Tensor, recent_probes: int, random_probes: int, seed: int) -> torch.Tensor:
    return cached_probe_rows(k.shape[2], recent_probes, random_probes, seed, k.device).clone()


@_probe_positions.register_fake
def _(k, recent_probes, random_probes, seed):
    return k.new_empty(torch.sym_min(k.shape[2], recent_probes + random_probes), dtype=torch.int64)


def probe_positions(k: torch.Tensor, recent_probes: int, random_probes: int, seed: int) -> torch.Tensor:
    """Return `probe_rows` of the `n` tokens of `k [B, Hkv, n, D]` on its device, as a step of a graph: int64 `[m]`."""
    return torch.ops.zipvl.probe_positions(k, recent_probes, random_probes, seed)
