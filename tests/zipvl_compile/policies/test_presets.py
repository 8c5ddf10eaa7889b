"""Presets: each compiles, keeps the newest token, and is exact where every token is kept."""

import pytest
import torch
from support.policies import LAYERS, N, dense
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llama import compiled, prompt

import zipvl_compile
from zipvl_compile.policies import names
from zipvl_compile.policies.presets import DEFAULT, PRESETS


def prefill(**options):
    torch._dynamo.reset()
    return compiled({"num_hidden_layers": LAYERS}, **options)(prompt(N), use_cache=True, logits_to_keep=1)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_exact_where_every_token_is_kept(name):
    torch.testing.assert_close(prefill(preset=name, tau=1.0).logits, dense().logits[:, -1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_drops_tokens_and_never_the_newest(name):
    kept = zipvl_compile.kept_tokens(prefill(preset=name, tau=0.6))
    assert all(positions.shape[2] < N and positions[0, 0, -1] == N - 1 for positions in kept)


def test_the_default_and_the_rules_of_presets_exist():
    assert DEFAULT in PRESETS and PRESETS["paper"] == {"policy": "paper"}
    assert {options["policy"] for options in PRESETS.values()} <= set(names())
