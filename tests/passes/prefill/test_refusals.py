"""Which layers are left alone, by number, by count and by a fraction of what the graph or its callers know."""

import pytest

from zipvl_compile.passes.prefill.refusals import left_alone, number_of, with_counted_layers
from zipvl_compile.passes.settings import Settings


@pytest.mark.parametrize(
    ("dense", "numbers", "known", "expected"),
    [
        (0, range(8), None, []),
        (3, range(8), None, [0, 1, 2]),
        ((1, 6), range(8), None, [1, 6]),
        (0.25, range(8), None, [0, 1]),
        (0.26, range(8), None, [0, 1, 2]),
        (0.1, range(30), None, [0, 1, 2]),
        (0.5, [5, 11], None, [5]),  # every sixth layer has a cache
        (0.25, [1], 36, [1]),
        (0.25, [9], 36, []),
        (0.25, [7], 4, []),  # callers that know another model
    ],
)
def test_layers_that_keep_every_token(dense, numbers, known, expected):
    settings = with_counted_layers(Settings(dense_layers=dense, decoder_layers=lambda: known), tuple(numbers))
    alone = {number: left_alone(number, settings) for number in numbers}
    assert [number for number, reason in alone.items() if reason is not None] == expected
    assert all(f"dense_layers={settings.dense_layers}" in str(alone[number]) for number in expected)


def test_the_number_of_a_layer():
    assert number_of("language_model.layers.3.self_attn", 0) == 3
    assert number_of("self_attn", 7) == 7
