"""Measurements as plain numbers: of each request, and of all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median

from zipvl_compile.report.requests import RequestStats

Numbers = dict[str, float]


def numbers(one: RequestStats) -> Numbers:
    """Return what a request took: times in milliseconds, `kept` as a share in [0, 1], the KV cache in bytes."""
    found: Numbers = {"prompt_tokens": one.prompt_tokens, "kept": one.kept, "prefill_ms": one.prefill_ms}
    if one.decode_ms is not None:
        found["decode_ms"] = one.decode_ms
    if one.cache is not None:
        found |= {"kv_bytes": one.cache.bytes_used, "kv_bytes_dense": one.cache.bytes_dense}
    return found | ({"batch": one.batch} if one.batch > 1 else {})


def summary(done: Sequence[RequestStats]) -> Numbers:
    """Return what requests took together: medians of times, since the first ones compile, means of all else."""
    every = [numbers(one) for one in done]
    found: Numbers = {}
    for name in ("prompt_tokens", "kept", "prefill_ms", "decode_ms", "kv_bytes", "kv_bytes_dense"):
        values = [one[name] for one in every if name in one]
        if values:
            found[name] = median(values) if name.endswith("_ms") else mean(values)
    return found


def text(kind: str, done: Sequence[RequestStats]) -> str:
    """Return a summary for people, on one line.

    Args:
        kind: of the requests.
        done: what they took.
    """
    if not done:
        return f"zipvl: no {kind} request was measured: none was made, or it ran no model of Hugging Face"
    of = summary(done)
    parts = [f"prefill {of['prefill_ms']:.1f} ms"]
    parts += [f"each further token {of['decode_ms']:.2f} ms"] if "decode_ms" in of else []
    parts += [f"{of['kept']:.1%} of {of['prompt_tokens']:,.0f} prompt tokens kept"]
    if "kv_bytes" in of:
        parts += [f"KV cache {of['kv_bytes']:,.0f} bytes, dense {of['kv_bytes_dense']:,.0f}"]
    return f"zipvl: {len(done)} {kind} requests: " + "; ".join(parts)
