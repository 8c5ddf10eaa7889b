"""A whole generate on CUDA. Run by `make gpu` where there is a device."""

from __future__ import annotations

import pytest
import torch
from tiny_llava import compiled, inputs, model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kernel", ["auto", "triton", "torch"])
@pytest.mark.parametrize("pad", [0, 7])
def test_generate_at_tau_1_equals_eager(pad, kernel):
    x = {name: value.cuda() for name, value in inputs(batch=2, text=20, pad=pad).items()}
    f = compiled(tau=1.0, inner="inductor", kernel=kernel).cuda()
    expected = model().cuda().generate(**x, max_new_tokens=12, do_sample=False)
    assert torch.equal(f.generate(**x, max_new_tokens=12, do_sample=False), expected)


def test_memory_of_dropped_tokens_is_freed():
    x = {name: value.cuda() for name, value in inputs(text=60).items()}
    with torch.no_grad():
        cache = compiled(keep_ratio=0.3).cuda()(**x, use_cache=True).past_key_values
    layer = cache.layers[0]
    tokens = layer.keys.untyped_storage().nbytes() // (layer.keys.shape[1] * layer.keys.shape[3] * 4)
    assert tokens == layer.kept.shape[2] + 32
