"""Eleven families of vision-language models: equal to eager at tau=1, compacted below it, every site accounted for."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, compiled, inputs, model
from transformers import PreTrainedModel

from zipvl_compile.kv_cache import CompactLayer
from zipvl_compile.report import CompileReport, collect

pytestmark = pytest.mark.slow
NEW_TOKENS = 12
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def generate(f: PreTrainedModel, x: dict, **more):
    return f.generate(**x, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **more)


def layers_of(family: str, layer_type: str) -> list[str]:
    """Return the attention paths of the decoder layers of one type, as far as Dynamo keeps them after graph breaks."""
    text = FAMILIES[family].text_model.removeprefix("model.")
    return [f"{text}.layers.{i}.self_attn" for i, kind in enumerate(FAMILIES[family].layer_types) if kind == layer_type]


def sites(reports: list[CompileReport], kind: str, rewritten: bool = True) -> list[list[str]]:
    """Return the layers of the sites of one kind, for each graph that has any."""
    found = [
        sorted(s.layer.removeprefix("model.") for s in report.sites if s.kind == kind and s.rewritten == rewritten)
        for report in reports
    ]
    return [layers for layers in found if layers]


@families
def test_greedy_tokens_equal_eager_at_tau_1(family):
    """One compiled model, three prompts: batch 1, another length, and a batch of 2 with left padding."""
    f, eager = compiled(family, tau=1.0), model(family)
    short, longer, padded = (
        inputs(family),
        inputs(family, text=19, seed=1),
        inputs(family, batch=2, text=14, pad=5, seed=3),
    )
    for x in (short, longer, padded):
        expected = generate(eager, x).sequences
        assert torch.equal(generate(f, x).sequences, expected)
        assert len(expected[:, -NEW_TOKENS:].unique()) > 3, "tokens that hardly vary show little"


@families
def test_direct_forward_equals_eager_at_tau_1_and_leaves_the_vision_tower_dense(family):
    f, eager, x = compiled(family, tau=1.0), model(family), inputs(family)
    with torch.no_grad(), collect() as reports:
        out, expected = f(**x, use_cache=True), eager(**x, use_cache=True)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert sites(reports, "prefill") == [layers_of(family, "full_attention")]
    sliding = layers_of(family, "sliding_attention")
    assert sites(reports, "prefill", rewritten=False) == ([sliding] if sliding else [])
    # How many vision sites Dynamo sees depends on its graph breaks: it traces a block's code once for all layers.
    vision = [s for r in reports for s in r.dense if s.kind == "other"]
    assert vision
    assert all(s.by_design and ("vision tower" in s.reason or "encoder that attends" in s.reason) for s in vision)


@families
def test_cache_is_compacted_below_tau_1_and_every_decoder_site_is_rewritten(family):
    pad = 5
    f, x = compiled(family, tau=0.8), inputs(family, batch=2, text=14, pad=pad, seed=3)
    with collect() as reports:
        out = generate(f, x, output_logits=True)
    n = x["input_ids"].shape[1]

    assert out.sequences.shape == (2, n + NEW_TOKENS)
    assert out.sequences.min() >= 0 and out.sequences.max() < VOCAB
    assert all(logits.isfinite().all() for logits in out.logits)

    for layer, kind in zip(out.past_key_values.layers, FAMILIES[family].layer_types, strict=True):
        assert layer.get_seq_length() == n + NEW_TOKENS - 1  # the last new token was never fed back
        assert isinstance(layer, CompactLayer) == (kind == "full_attention")
        if isinstance(layer, CompactLayer):
            assert layer.prompt_length == n
            assert layer.kept.shape[2] < 0.9 * n
            assert layer.kept[0].min() >= pad, "padding is never important"
            assert layer.cached_length == layer.kept.shape[2] + NEW_TOKENS - 1

    full, sliding = layers_of(family, "full_attention"), layers_of(family, "sliding_attention")
    # Decode compiles for one step and then for every step. Whether the vision tower runs inside the compiled forward
    # depends on the version of transformers.
    assert sites(reports, "prefill") == [full]
    assert sites(reports, "decode") in ([full], [full, full])
    decoder = {*full, *sliding}
    assert not decoder & {layer for graph in sites(reports, "other", rewritten=False) for layer in graph}
    for kind in ("prefill", "decode"):
        assert sites(reports, kind, rewritten=False) == ([sliding] * len(sites(reports, kind)) if sliding else [])
    dense = [s for report in reports for s in report.dense]
    assert all(s.by_design and (s.kind == "other" or s.reason.startswith("sliding window")) for s in dense)
