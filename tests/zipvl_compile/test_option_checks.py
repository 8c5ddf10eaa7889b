"""Every option has a check; numbers of other libraries become Python's."""

import dataclasses

import numpy
import pytest

from zipvl_compile.option_checks import CHECKS, plain
from zipvl_compile.options import ZipVLOptions


def test_every_option_has_a_check_that_its_default_passes():
    names = {field.name for field in dataclasses.fields(ZipVLOptions)}
    assert {*CHECKS} - {"queries"} == names
    usual = ZipVLOptions.parse()
    assert all(CHECKS[name][0](getattr(usual, name)) for name in names)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(numpy.int64(3), int), (numpy.float32(0.5), float), (True, bool), ("host", str), ([numpy.int32(1)], tuple)],
)
def test_plain_numbers(value, expected):
    assert type(plain(value)) is expected
    assert plain(value) == (tuple(value) if isinstance(value, list) else value)


def test_only_widths_that_fill_a_byte():
    holds = CHECKS["evict_bits"][0]
    assert [bits for bits in range(-1, 17) if holds(bits)] == [2, 4, 8]
