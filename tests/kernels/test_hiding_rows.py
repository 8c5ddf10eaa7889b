"""hiding_rows: a mask that hides nothing becomes one of no samples."""

import torch

from zipvl_compile.kernels.hiding_rows import hiding_rows


def test_a_mask_that_hides_something_is_copied():
    row = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    row[1, 0, 0, :3] = False
    copy = hiding_rows(row)
    assert torch.equal(copy, row) and copy.data_ptr() != row.data_ptr()


def test_a_mask_that_hides_nothing_becomes_one_of_no_samples():
    assert hiding_rows(torch.ones(2, 1, 1, 9, dtype=torch.bool)).shape == (0, 1, 1, 9)
    assert hiding_rows(torch.ones(0, 1, 1, 9, dtype=torch.bool)).shape == (0, 1, 1, 9)
