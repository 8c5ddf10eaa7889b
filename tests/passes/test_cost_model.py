"""The cost model: its formulas against counting by hand, its break-even against its own predictions."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zipvl_compile.passes.cost_model import NEVER, AttentionShape, Machine, break_even, choice_below, seconds

SHAPE = AttentionShape(1, 8, 2, 64, 32, 128, 4)
MACHINE = Machine(attend=4e-11, edge=2e-9, multiply=2e-11, score=7e-9, token=4e-7, byte=3e-10, site=7e-4)
NOTHING = Machine(0, 0, 0, 0, 0, 0, 0)


def only(**constants):
    return dataclasses.replace(NOTHING, **constants)


def test_dense_counts_the_causal_half_of_both_products():
    dense, sparse = seconds(SHAPE, only(attend=1.0), 1000, 0.5)
    assert dense == 8 * 1000**2 * (64 + 32) / 2
    assert sparse == dense / 4, "p squared"


def test_the_diagonal_costs_as_many_blocks_as_there_are_queries():
    dense, sparse = seconds(SHAPE, only(edge=1.0), 1000, 0.5)
    assert dense == 8 * 1000 * (64 + 32) / 2
    assert sparse == dense / 2


def test_every_query_over_the_kept_keys():
    everyone = dataclasses.replace(SHAPE, every_query=True)
    dense, sparse = seconds(everyone, only(attend=1.0), 1000, 0.5)
    assert sparse == dense / 2, "n times p"
    dense, sparse = seconds(everyone, only(edge=1.0), 1000, 0.5)
    assert sparse == dense, "as many queries"


def test_a_window_costs_its_keys_for_every_query():
    near = dataclasses.replace(SHAPE, local=68)
    for constants, cost in (({"attend": 1.0}, 8 * (64 + 32) * 68 * 1000), ({"edge": 1.0}, 8 * (64 + 32) / 2 * 1000)):
        (dense, sparse), (same, more) = (seconds(shape, only(**constants), 1000, 0.5) for shape in (SHAPE, near))
        assert (same, more - sparse) == (dense, cost)
    assert break_even(near, MACHINE, 0.5) > break_even(SHAPE, MACHINE, 0.5)


def test_what_a_token_saves_that_passes_the_layer():
    skipping = dataclasses.replace(SHAPE, work=7, batch=3)
    assert seconds(skipping, only(product=1.0), 1000, 0.4) == (3 * 7 * 1000, pytest.approx(3 * 7 * 400))
    layer = dataclasses.replace(SHAPE, work=10_000_000)
    machine = dataclasses.replace(MACHINE, product=2e-11)
    assert break_even(layer, machine, 0.5) < 200 < 500 < break_even(SHAPE, machine, 0.5)
    assert break_even(layer, machine, 1.0) == NEVER


def test_scores_are_probe_rows_times_tokens():
    assert seconds(SHAPE, only(multiply=1.0), 1000, 0.5) == (0, 8 * 128 * 1000 * 64)
    assert seconds(SHAPE, only(score=1.0), 1000, 0.5) == (0, 8 * 128 * 1000)
    assert seconds(SHAPE, only(token=1.0), 1000, 0.5) == (0, 1000)


def test_choosing_is_a_small_part_of_dense_attention_from_some_length_on():
    machine = dataclasses.replace(MACHINE, byte=0.0)
    choice = dataclasses.replace(machine, attend=0.0, edge=0.0)
    n = choice_below(SHAPE, machine, 0.15)
    for length, below in ((n, True), (n - 1, False)):
        dense, chosen = seconds(SHAPE, machine, length, 0.5)[0], seconds(SHAPE, choice, length, 0.5)[1]
        assert (chosen <= 0.15 * dense) == below
    assert choice_below(SHAPE, dataclasses.replace(machine, attend=0.0), 0.001) == NEVER


def test_gathers_move_what_is_kept_and_put_every_row_back():
    kept, back = 500 * (2 * (64 + 32) + 2 * 8 * 64 + 8 * 32), 1000 * 8 * 32
    assert seconds(SHAPE, only(byte=1.0), 1000, 0.5) == (0, 4 * (kept + back))


def test_a_batch_costs_as_many_samples_and_one_site():
    (dense, sparse), (twice, both) = (
        seconds(dataclasses.replace(SHAPE, batch=batch), MACHINE, 999, 0.3) for batch in (1, 2)
    )
    assert twice == pytest.approx(2 * dense)
    assert both == pytest.approx(2 * sparse - MACHINE.site)


def test_a_machine_like_the_one_it_was_made_on():
    assert 500 < break_even(SHAPE, MACHINE, 0.367) < break_even(SHAPE, MACHINE, 0.8) < 5000


def test_keeping_every_token_never_pays():
    assert break_even(SHAPE, MACHINE, 1.0) == NEVER


def test_free_choosing_always_pays():
    assert break_even(SHAPE, only(attend=1.0), 0.5) == 0


def test_a_mask_in_memory_costs_where_there_is_one():
    masked = only(attend=1.0, masked=0.5)
    plain = seconds(SHAPE, masked, 1000, 0.5)
    dense = dataclasses.replace(SHAPE, dense_mask=True)
    assert seconds(dense, masked, 1000, 0.5) == (1.5 * plain[0], plain[1])
    both = dataclasses.replace(dense, sparse_mask=True)
    assert seconds(both, masked, 1000, 0.5) == (1.5 * plain[0], 1.5 * plain[1])


def test_the_host_counts_as_far_as_the_layer_leaves_the_gpu_too_little_to_do():
    host, other = 2e-3, 12 * 1e-12 * (8 * 64) ** 2  # per token
    late = only(host=host, product=1e-12)
    assert seconds(SHAPE, late, 100, 0.5) == (0, pytest.approx(host - 100 * other))
    assert seconds(SHAPE, late, 10_000, 0.5) == (0, 0)


@pytest.mark.parametrize("product", [0.0, 1e-13, 1e-12, 1e-9])
@pytest.mark.parametrize("host", [1e-4, 1e-2])
def test_a_host_that_is_late_raises_the_break_even_length(host, product):
    late = dataclasses.replace(MACHINE, host=host, product=product)
    length = break_even(SHAPE, late, 0.5)
    assert length >= break_even(SHAPE, MACHINE, 0.5)
    for tokens in (length, 2 * length, 10 * length):
        dense, sparse = seconds(SHAPE, late, tokens, 0.5)
        assert sparse <= dense * (1 + 1e-9)
    if product == 1e-9:  # hidden from few tokens on
        assert length == break_even(SHAPE, MACHINE, 0.5)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(kept=st.floats(0.02, 0.98), batch=st.integers(1, 8), heads=st.sampled_from([(8, 2), (40, 40), (4, 1)]),
       width=st.sampled_from([32, 64, 128]), scale=st.floats(0.1, 10), every=st.booleans())  # fmt: skip
def test_sparse_is_faster_exactly_from_the_break_even_length(kept, batch, heads, width, scale, every):
    shape = AttentionShape(batch, *heads, width, width, 128, 2, every)
    machine = dataclasses.replace(MACHINE, attend=MACHINE.attend * scale)
    length = break_even(shape, machine, kept)
    for tokens in (length, 2 * length, 10 * length):
        dense, sparse = seconds(shape, machine, tokens, kept)
        assert sparse <= dense * (1 + 1e-9)
    for tokens in (length - 1, length // 2, length // 10):
        dense, sparse = seconds(shape, machine, max(tokens, 0), kept)
        assert sparse > dense * (1 - 1e-9)
