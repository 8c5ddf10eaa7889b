"""`kept_tokens`: the positions that each layer holds, of a cache or of an output with one."""

from __future__ import annotations

import pytest
import torch
from support.tiny_llava import inputs, shared

from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.cache.kept_tokens import kept_tokens


def test_kept_tokens_returns_positions_per_layer():
    out = shared(tau=0.7).generate(**inputs(text=20), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    n = inputs(text=20)["input_ids"].shape[1]
    cache = cache_of(out)
    for kept, same, layer in zip(*map(kept_tokens, (out, cache)), cache.layers, strict=True):
        assert torch.equal(kept, same)
        assert kept.dtype == torch.int64 and kept.shape == (1, 1, layer.keys.shape[2])
        assert (kept.diff(dim=-1) > 0).all() and kept[0, 0, -3:].tolist() == [n, n + 1, n + 2]
        assert (n - 1) in kept[0, 0]
    for bad in (cache.layers, out.sequences, None):
        with pytest.raises(
            TypeError, match=f"cache: expected a transformers Cache or an output.*got {type(bad).__name__}"
        ):
            kept_tokens(bad)
