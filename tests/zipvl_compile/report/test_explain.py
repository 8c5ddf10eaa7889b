"""`explain`: every attention of a model is listed with what was done and why, and the model stays as it was."""

import copy
import re
import warnings

import pytest
import torch
from transformers import AttentionInterface, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from zipvl_compile.cache.hf_names import CACHE_NAME
from zipvl_compile.report import compile_report as report
from zipvl_compile.report.explain import explain

LAYERS, VISION_LAYERS, PATCHES, TEXT = 2, 1, 16, 40
EVERY_LENGTH = {"min_tokens": 0}


@pytest.fixture(scope="module")
def model():
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=5, image_seq_length=PATCHES, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(6, 64, (1, TEXT), generator=generator)
    ids = torch.cat([torch.ones(1, 1, dtype=torch.int64), torch.full((1, PATCHES), 5), text], 1)
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.fixture(scope="module")
def explanation(model, inputs):
    return explain(model, options={**EVERY_LENGTH, "policy": "paper", "keep_ratio": 0.25}, **inputs)


def decoder(kind, explanation):
    return [row for row in explanation.rows if row.kind == kind]


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_every_decoder_layer_is_listed_once_in_order(explanation, kind):
    names = [f"model.language_model.layers.{i}.self_attn" for i in range(LAYERS)]
    assert [(row.layer, row.outcome) for row in decoder(kind, explanation)] == [(name, "rewritten") for name in names]


def test_vision_tower_is_dense_with_its_reason(explanation):
    rows = decoder("other", explanation)
    assert len(rows) == VISION_LAYERS
    for row in rows:
        assert "vision_tower" in row.layer and row.outcome == "dense" and "vision tower" in str(row.reason)


def test_kept_tokens_are_those_of_the_cache(explanation):
    prompt = 1 + PATCHES + TEXT
    assert explanation.prompt_length == prompt
    for row in decoder("prefill", explanation):
        assert row.kept == -(-prompt // 4) and row.fraction == row.kept / prompt
    assert all(row.kept is None and row.fraction is None for row in decoder("decode", explanation))


def test_an_eager_model_stays_eager(model, explanation):
    assert model._compiled_call_impl is None


def test_text_shows_every_row(explanation):
    lines = str(explanation).splitlines()
    assert f"{2 * LAYERS} attention sites rewritten, {VISION_LAYERS} dense" in lines[0]
    for row, line in zip(explanation.rows, lines[2:], strict=True):
        assert line.split()[:3] == [row.layer, row.kind, row.outcome]
        assert line.endswith(str(row.reason or (PREFILL if row.kind == "prefill" else "rewritten")))


PREFILL = "15 of 57 (26.3%), pruned q, v, output"


def test_projections_that_stay_dense_say_why(model, inputs):
    options = {**EVERY_LENGTH, "policy": "paper", "keep_ratio": 0.25, "evict": "keep"}
    shown = explain(model, options=options, **inputs)
    assert {row.pruned for row in decoder("prefill", shown)} == {"q, output"}
    assert {row.pruned for row in shown.rows if row.kind != "prefill"} == {""}
    assert f"Computed for every token in {LAYERS} layers: v (read by 'gather_tokens' as well)." in shown.notes


def test_layers_that_tokens_pass_are_said_and_those_that_they_do_not(model, inputs):
    options = {**EVERY_LENGTH, "policy": "skip_layers", "dense_layers": 0, "keep_ratio": 0.25}
    shown = explain(model, options=options, **inputs)
    passed = [row.pruned == "q, v, output, layer" for row in decoder("prefill", shown)]
    assert passed == [True] * (LAYERS - 1) + [False], "of the last layer the newest row alone is computed"
    assert "Computed for every token in 1 layers: layer (only some of its rows are needed)." in shown.notes


def test_table_shows_every_row_in_80_columns(explanation):
    rich_console = pytest.importorskip("rich.console", reason="an extra: pip install 'zipvl-compile[demo]'")
    console = rich_console.Console(width=80, record=True)
    console.print(explanation)
    text = console.export_text()
    assert text.count("language_model.layers.1 ") == 2 and text.count("vision_tower") == VISION_LAYERS
    assert text.count("rewritten, kept 15 of 57 (26.3%)") == LAYERS and "dense: no KV cache" in text


def test_a_short_prompt_is_dense_and_the_remedy_is_named(model, inputs):
    explanation = explain(model, **inputs)
    rows = decoder("prefill", explanation)
    assert len(rows) == LAYERS and all(re.search(r"min_tokens=\d+", str(row.reason)) for row in rows)
    assert all(row.kept == explanation.prompt_length for row in rows)
    assert any("'min_tokens': 0" in note for note in explanation.notes)


def test_asked_again_and_of_a_wrapped_model_the_same_is_said(model, inputs, explanation):
    wrapped = torch.compile(model, backend="eager")
    assert explain(wrapped, options={**EVERY_LENGTH, "policy": "paper", "keep_ratio": 0.25}, **inputs) == explanation


def test_a_compiled_model_stays_as_it_was(model, inputs):
    model = copy.deepcopy(model)
    model.compile(backend="zipvl", options={**EVERY_LENGTH, "inner": "eager"})
    before, attributes = model._compiled_call_impl, set(vars(model))
    warned, weights = set(report._warned), {name: p.clone() for name, p in model.state_dict().items()}
    explain(model, options=EVERY_LENGTH, **inputs)
    assert model._compiled_call_impl is before and set(vars(model)) == attributes
    assert report._warned == warned and not model.training
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    # Nothing that `explain` compiled is reused: the model still compiles, and reports, for itself.
    with report.collect() as reports, torch.no_grad():
        model(**inputs)
    assert sum(len(one.rewritten) for one in reports) == LAYERS


def weights_squared(module, query, key, value, attention_mask, scaling, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling, -1)
    return (weights.pow(2) @ value).transpose(1, 2), None


def test_warnings_become_rows_and_are_not_used_up(model, inputs, monkeypatch):
    monkeypatch.setattr(report, "_warned", set())
    AttentionInterface.register("weights_squared", weights_squared)
    odd = copy.deepcopy(model)
    odd.set_attn_implementation("weights_squared")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation = explain(odd, options=EVERY_LENGTH, **inputs)
    rows = decoder("prefill", explanation)
    difference = "nearest pattern: eager attention; first difference: the attention weights go through 'pow'"
    assert len(rows) == LAYERS and all(difference in str(row.reason) for row in rows)
    assert not any("nearest pattern" in reason for reason in report._warned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_vals": torch.zeros(1)}, "'pixel_vals'.*Did you mean 'pixel_values'"),
        ({CACHE_NAME: object()}, f"{CACHE_NAME}: expected a transformers Cache, got object"),
        ({"input_ids": None}, "expected a prompt as input_ids"),
        ({"options": {"tua": 1.0}}, "'tua'.*Did you mean 'tau'"),
        ({"options": {"tau": 2.0}}, "'tau': expected a fraction"),
    ],
    ids=["name", "cache", "no-prompt", "option-name", "option-value"],
)
def test_bad_arguments_are_explained(model, inputs, change, message):
    given = {name: value for name, value in {**inputs, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        explain(model, **given)


def test_a_mode_of_inductor_is_no_hindrance(model, inputs, explanation):
    options = {**EVERY_LENGTH, "policy": "paper", "keep_ratio": 0.25, "mode": "max-autotune"}
    assert explain(model, options=options, **inputs) == explanation


def test_only_models_are_explained(inputs):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        explain("llava", **inputs)


def test_a_model_without_a_cache_is_named(model, inputs):
    with pytest.raises(ValueError, match="forward returns logits and a KV cache, got LlavaModel"):
        explain(model.model, input_ids=inputs["input_ids"][:, -TEXT:])
