"""A whole generate on CUDA. Run by `make gpu` where there is a device."""

from __future__ import annotations

import pytest
import torch
from support.tiny_llava import compiled, inputs, model

from zipvl_compile.cache.hf_names import cache_of

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
        cache = cache_of(compiled(keep_ratio=0.3).cuda()(**x, use_cache=True))
    layer = cache.layers[0]
    tokens = layer.keys.untyped_storage().nbytes() // (layer.keys.shape[1] * layer.keys.shape[3] * 4)
    assert tokens == layer.positions.shape[2] + 32


def test_default_options_measure_the_gpu_and_leave_a_short_prompt_dense():
    x = {name: value.cuda() for name, value in inputs(text=60).items()}
    f = compiled(min_tokens=None, inner="inductor").cuda()
    expected = model().cuda().generate(**x, max_new_tokens=8, do_sample=False)
    assert torch.equal(f.generate(**x, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_padding_that_hides_something_and_padding_that_hides_nothing(batch):
    x = {name: value.cuda() for name, value in inputs(batch=batch, text=40, pad=9).items()}
    f, g = (compiled(keep_ratio=0.5, inner=inner).cuda() for inner in ("inductor", "eager"))
    with torch.no_grad():
        torch.testing.assert_close(f(**x).logits[:, -1], g(**x).logits[:, -1], atol=1e-3, rtol=1e-3)
