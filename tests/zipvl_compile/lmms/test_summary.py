"""Numbers of one request and of many."""

from __future__ import annotations

import pytest

from zipvl_compile.lmms.summary import numbers, summary, text
from zipvl_compile.report.requests import RequestStats
from zipvl_compile.report.stats import CacheStats, LayerStats


def took(prefill=10.0, decode=2.0, kept=40, batch=1, cache=True):
    layer = LayerStats(100, kept, kept + 2, 102, bytes_used=8 * kept, bytes_allocated=999, bytes_freed=8 * (100 - kept))
    return RequestStats("M", batch, 100, 3, prefill, decode, 0, {}, CacheStats((layer,)) if cache else None)


def test_numbers_of_a_request():
    assert numbers(took()) == {
        "prompt_tokens": 100, "kept": 0.4, "prefill_ms": 10.0, "decode_ms": 2.0, "kv_bytes": 320, "kv_bytes_dense": 800,
    }  # fmt: skip
    assert numbers(took(decode=None, cache=False, batch=2)) == {
        "prompt_tokens": 100, "kept": 1.0, "prefill_ms": 10.0, "batch": 2,
    }  # fmt: skip


def test_times_are_medians_since_the_first_request_compiles():
    got = summary([took(5000.0, 400.0, 30), took(10.0, 2.0, 40), took(20.0, None, 80)])
    assert got["prefill_ms"] == 20.0 and got["decode_ms"] == 201.0
    assert got["kept"] == pytest.approx(0.5) and got["kv_bytes"] == 400 and got["kv_bytes_dense"] == 800


def test_a_line_for_people():
    line = text("generate_until", [took(), took()])
    assert line.startswith(
        "zipvl: 2 generate_until requests: prefill 10.0 ms; each further token 2.00 ms; 40.0% of 100 "
    )
    assert "KV cache 320 bytes, dense 800" in line
    assert "further" not in text("loglikelihood", [took(decode=None)])
    assert "no loglikelihood request was measured" in text("loglikelihood", [])
