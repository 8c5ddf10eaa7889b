"""Metrics on hand-computed logits, standard errors by hand, and what a cache holds."""

import math

import pytest
import torch
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llama import model, prompt

from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.evaluate.compiled import compiled_for
from zipvl_compile.evaluate.measures import agreement, kept_share, kl, mean_of, nll, paired, summary
from zipvl_compile.report.stats import stats

FLAT, HALF, SURE = [0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.25, 0.125]


def logs(*rows):
    return torch.tensor(rows).log()


def test_likelihood_divergence_and_agreement_by_hand():
    assert nll(logs(FLAT, HALF), torch.tensor([3, 0])) == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert kl(logs(HALF), logs(HALF)) == 0
    # .5 log(.5/.25) + .25 log 1 + 2 * .125 log(.125/.25) = .25 log 2
    assert kl(logs(HALF), logs(FLAT)) == pytest.approx(0.25 * math.log(2))
    assert kl(logs(HALF, FLAT), logs(FLAT, FLAT)) == pytest.approx(0.125 * math.log(2)), "the mean of the rows"
    assert agreement(logs(HALF, SURE), logs(HALF, HALF)) == 0.5


def test_standard_errors_by_hand():
    assert mean_of([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2) / math.sqrt(2)))
    # Differences 1, 2, 3: their standard deviation is 1, whatever the values themselves do.
    assert paired([11.0, 102.0, 3.0], [10.0, 100.0, 0.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_of([5.0]) == (5.0, None), "one value says nothing of the error"
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


def test_a_summary_has_errors_differences_and_ratios_as_metrics_of_their_own():
    dense = [{"nll": 1.0, "kept": 1.0, "kv_bytes": 100}, {"nll": 2.0, "kept": 1.0, "kv_bytes": 300}]
    items = [{"nll": 1.5, "kept": 0.5, "kv_bytes": 50}, {"nll": 2.7, "kept": 0.3, "kv_bytes": 70}]
    found = summary(items, dense)
    assert found["nll"] == (pytest.approx(2.1), "nats") and found["kv_bytes"] == (60, "bytes")
    assert found["nll_minus_dense"] == (pytest.approx(0.6), "nats")
    assert found["nll_minus_dense_se"] == (pytest.approx(0.1), "nats")
    assert found["kept"] == (pytest.approx(0.4), "fraction")
    assert found["kv_bytes_of_dense"] == (pytest.approx(120 / 400), "fraction")
    assert "kept_minus_dense" not in found and "nll_of_dense" not in found
    assert not [metric for metric in summary(items[:1], dense[:1]) if metric.endswith("_se")]


def bytes_of(cache):
    return stats(cache).bytes_used, stats(cache).bytes_allocated


def test_bytes_and_share_of_a_cache():
    llama, n = model(), 40
    row = 2 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, head_dim, fp32
    dense = cache_of(llama(input_ids=prompt(n)))
    assert (kept_share(dense, n), *bytes_of(dense)) == (1.0, n * row, n * row)
    kept = cache_of(compiled_for(llama, {"keep_ratio": 0.5})(input_ids=prompt(n), logits_to_keep=1))
    spare, positions = kept.layers[0].key_buffer.shape[2], 2 * (n // 2) * 8
    assert kept_share(kept, n) == 0.5
    assert bytes_of(kept) == (n // 2 * row, spare * row + positions)
