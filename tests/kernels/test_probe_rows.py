"""Probe rows: the newest ones, and a seeded draw from the others."""

import pytest
import torch

from zipvl_compile.kernels.probe_rows import probe_rows


@pytest.mark.parametrize("n", [0, 1, 2, 63, 127, 128])
def test_short_prompt_probes_every_row(n):
    assert probe_rows(n, 64, 64, 0).tolist() == list(range(n))


@pytest.mark.parametrize("n", [129, 500, 4096])
@pytest.mark.parametrize(("recent_probes", "random_probes"), [(64, 64), (1, 0), (0, 7), (128, 1), (5, 3)])
def test_long_prompt_probes_the_newest_rows_and_distinct_others(n, recent_probes, random_probes):
    rows = probe_rows(n, recent_probes, random_probes, 3).tolist()
    assert rows == sorted(set(rows)), "ascending, none twice"
    assert len(rows) == recent_probes + random_probes
    assert rows[random_probes:] == list(range(n - recent_probes, n))
    assert all(0 <= row < n - recent_probes for row in rows[:random_probes])


def test_draw_repeats_for_equal_arguments_and_follows_the_seed():
    before = torch.get_rng_state()
    first = probe_rows(1000, 64, 64, 5)
    assert torch.equal(first, probe_rows(1000, 64, 64, 5))
    assert not torch.equal(first, probe_rows(1000, 64, 64, 6))
    assert torch.equal(before, torch.get_rng_state()), "the user's random numbers must not change"


def test_global_seed_does_not_matter():
    torch.manual_seed(1)
    first = probe_rows(1000, 64, 64, 0)
    torch.manual_seed(2)
    assert torch.equal(first, probe_rows(1000, 64, 64, 0))


def test_draw_reaches_the_whole_prompt():
    drawn = torch.cat([probe_rows(40, 4, 4, seed)[:4] for seed in range(200)])
    assert drawn.unique().tolist() == list(range(36))


def test_result_is_the_callers_own():
    probe_rows(1000, 64, 64, 0).fill_(-1)
    assert probe_rows(1000, 64, 64, 0).min() >= 0


def test_rows_are_int64():
    assert probe_rows(10, 64, 64, 0).dtype == probe_rows(500, 64, 64, 0).dtype == torch.int64
