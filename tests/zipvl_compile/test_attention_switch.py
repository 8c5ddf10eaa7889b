"""`attention=` sets the switch in every part that has it, and nothing where the decoder does not."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import model
from torch import nn

import zipvl_compile
from zipvl_compile.attention_switch import READ, check, switch
from zipvl_compile.dynamo import in_place_for_zipvl


def switches(f) -> dict[str, str]:
    """Return the switch of the model and of each part that has a configuration of its own."""
    parts = {name: getattr(f.config, name) for name in f.config.sub_configs}
    return {"": f.config._attn_implementation} | {name: part._attn_implementation for name, part in parts.items()}


@pytest.mark.parametrize("attention", READ)
def test_every_part_is_switched(attention):
    f = model("llava", "eager" if attention == "sdpa" else "sdpa")
    switch(f, [f], attention)
    assert switches(f) == {"": attention, "vision_config": attention, "text_config": attention}


def test_a_part_that_has_no_such_attention_keeps_its_own():
    f = model("fast_vlm", "eager")
    switch(f, [f], "sdpa")
    assert switches(f) == {"": "sdpa", "vision_config": "eager", "text_config": "sdpa"}


def test_parts_that_transformers_cannot_switch_keep_theirs():
    f = model("got_ocr2")
    switch(f, [f], "sdpa")
    assert switches(f) == {"": "eager", "vision_config": "eager", "text_config": "sdpa"}


@pytest.mark.parametrize(
    ("family", "decoder", "why"),
    [("inkling2", "Inkling2TextModel", "does not support"), ("blip", "BlipTextLMHeadModel", "cannot switch")],
)
def test_a_decoder_that_has_no_such_attention_is_an_error_and_nothing_is_changed(family, decoder, why):
    f = model(family)
    before = switches(f)
    with pytest.raises(ValueError, match=rf"attention: .* {decoder} has, got 'sdpa': .*{why}.*Leave attention out"):
        zipvl_compile.compile(f, attention="sdpa")
    assert switches(f) == before and not in_place_for_zipvl(f)


def test_a_module_that_is_no_model_is_an_error():
    with pytest.raises(ValueError, match="attention: expected None for Linear, which is no Hugging Face model"):
        zipvl_compile.compile(nn.Linear(2, 2), attention="sdpa")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "", True])
def test_a_switch_that_is_not_read_is_an_error_that_says_which_are(attention):
    f = model("llava")
    with pytest.raises(ValueError, match=r'attention: expected None, "sdpa" or "eager".*Use "sdpa"'):
        zipvl_compile.compile(f, attention=attention)
    assert not in_place_for_zipvl(f)
    check(None)


def test_without_it_the_switch_stays():
    torch._dynamo.reset()
    f = model("llava", "eager")
    zipvl_compile.compile(f)
    assert set(switches(f).values()) == {"eager"}
