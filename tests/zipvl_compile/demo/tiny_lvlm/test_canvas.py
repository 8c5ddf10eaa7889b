"""The canvases: as many tokens as cells, and a word for every row and column."""

from zipvl_compile.demo.tiny_lvlm.canvas import CANVASES, CELL, LARGE, SMALL


def test_canvases():
    assert [CANVASES[name] for name in ("small", "large")] == [SMALL, LARGE]
    for canvas in (SMALL, LARGE):
        assert canvas.tokens == canvas.grid**2 == (canvas.size // CELL) ** 2
        assert (canvas.rows[0], canvas.columns[-1]) == ("r1", f"c{canvas.grid}")
    assert (SMALL.tokens, LARGE.tokens) == (256, 9216)
    assert LARGE.rows[: SMALL.grid] == SMALL.rows
