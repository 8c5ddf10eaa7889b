"""What is particular to window_attention in Triton: the tiles of the rows that attend locally."""

from zipvl_compile.kernels.window_attention_triton import local_tiling


def test_local_tiles_are_no_larger_than_the_usual_window():
    assert local_tiling((128, 128, 8, 3)) == (64, 64, 4, 3)
    assert local_tiling((16, 16, 4, 1)) == (16, 16, 4, 1)
