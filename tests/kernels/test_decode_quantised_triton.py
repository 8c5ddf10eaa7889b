"""The kernel behind decode_quantised: what it shares with decode_attention, launch by launch."""

import pytest
import torch
from support.quantised import cache

from zipvl_compile.kernels import decode_attention as launches
from zipvl_compile.kernels.common.dispatch import interpreted
from zipvl_compile.kernels.decode_attention import Parts
from zipvl_compile.kernels.decode_quantised_torch import _decode_torch
from zipvl_compile.kernels.decode_quantised_triton import decode_triton

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs where there is no GPU")


@pytest.mark.parametrize("programs", [1, 10_000])
def test_each_launch_has_parts_of_its_own(monkeypatch, programs):
    """Both launches write to the arrays that one join reads, no part twice, and none is left out."""
    monkeypatch.setattr(launches, "PROGRAMS", programs)
    given = {**cache(1, kept=100, others=200, dtype=torch.float32).given, "scale": 0.3, "softcap": None}
    made = []

    class Recorded(Parts):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            self.written["totals"].fill_(-1.0)
            made.append(self)

    monkeypatch.setattr("zipvl_compile.kernels.decode_quantised_triton.Parts", Recorded)
    out = decode_triton(**given)
    (parts,) = made
    used = parts.splits * 2
    assert used <= launches.MAX_SPLITS and parts.splits == min(programs // 2 or 1, launches.MAX_SPLITS // 2)
    assert (parts.written["totals"][:, :used] >= 0).all() and (parts.written["totals"][:, used:] == -1).all()
    torch.testing.assert_close(out, _decode_torch(**given), rtol=2e-6, atol=2e-6)


def test_the_buffers_are_read_where_they_are():
    """Strides of a cache that is part of a larger tensor; codes of any strides."""
    given = {**cache(mask="row", dtype=torch.float32).given, "scale": None, "softcap": None}
    expected = decode_triton(**given)
    for name in ("q", "keys", "values"):
        given[name] = torch.cat([given[name], given[name]], 2)[:, :, : given[name].shape[2]]
    for name in ("key_codes", "value_codes", "key_scales", "value_scales"):
        given[name] = given[name].transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(decode_triton(**given), expected, rtol=0, atol=0)
