"""The probe rows: whose attention is measured in the place of everyone's.

R is the `recent_probes` newest rows and `random_probes` rows drawn, seeded or at equal distances, from the others.

Source: ZipVL (arXiv 2410.08584), probe tokens.
"""

from __future__ import annotations

import functools

import torch

STRIDED = -1  # as a seed: rows at equal distances


@functools.lru_cache(maxsize=512)
def cached_probe_rows(n: int, recent_probes: int, random_probes: int, seed: int, device: torch.device) -> torch.Tensor:
    """Return `probe_rows` on `device` without a copy: do not write to it.

    Once there, they cost no transfer, for which the host would wait for the device in every layer.
    """
    if device.type != "cpu":
        return cached_probe_rows(n, recent_probes, random_probes, seed, torch.device("cpu")).to(device)
    if n <= recent_probes + random_probes:
        return torch.arange(n)
    rest = n - recent_probes
    if seed == STRIDED:  # the middles of equal parts
        return torch.cat([(torch.arange(random_probes) * 2 + 1) * rest // (2 * random_probes), torch.arange(rest, n)])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(rest, generator=generator)[:random_probes].sort().values
    return torch.cat([drawn, torch.arange(rest, n)])


def probe_rows(n: int, recent_probes: int, random_probes: int, seed: int) -> torch.Tensor:
    """Return the probe rows of an `n`-token prompt: int64 `[min(n, recent_probes + random_probes)]`, ascending.

    Args:
        n: prompt length in tokens.
        recent_probes: newest rows that are always probes.
        random_probes: rows drawn without replacement from the rest.
        seed: of the draw, or `STRIDED`; equal arguments give equal rows, on every device.
    """
    return cached_probe_rows(n, recent_probes, random_probes, seed, torch.device("cpu")).clone()


def shuffled_order(positions: torch.Tensor, seed: int) -> torch.Tensor:
    """Return numbers in [0, 2^32) that order int64 `positions` at random: equal seeds give equal orders, everywhere."""
    x = (positions + 1) * 0x9E3779B1 + seed * 0x85EBCA77  # an integer hash, since a generator would need the length
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return x ^ (x >> 15)


@torch.library.custom_op("zipvl::probe_positions", mutates_args=())
def _probe_positions(k: torch.Tensor, recent_probes: int, random_probes: int, seed: int) -> torch.Tensor:
    return cached_probe_rows(k.shape[2], recent_probes, random_probes, seed, k.device).clone()


@_probe_positions.register_fake
def _(k, recent_probes, random_probes, seed):
    return k.new_empty(torch.sym_min(k.shape[2], recent_probes + random_probes), dtype=torch.int64)


def probe_positions(k: torch.Tensor, recent_probes: int, random_probes: int, seed: int) -> torch.Tensor:
    """Return `probe_rows` of the `n` tokens of `k [B, Hkv, n, D]` on its device, as a step of a graph: int64 `[m]`."""
    return torch.ops.zipvl.probe_positions(k, recent_probes, random_probes, seed)
