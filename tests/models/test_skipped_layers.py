"""Layers that tokens pass, in the forms that families have: the family's own eager layers on the kept tokens alone."""

import pytest
import torch
from families.skipping import NARROWED, run

pytestmark = pytest.mark.slow
# One after the other, with features added to some layers, with norms on either side, side by side, with experts.
DETAIL = ("llava", "qwen3_vl", "glm4v", "aya_vision", "qwen3_vl_moe")
OTHERS = (
    "llava_next", "internvl", "mistral3", "llava_onevision", "pixtral", "cohere2_vision", "ovis2", "lfm2_vl",
    "granite4_vision", "qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "molmo2", "hunyuan_vl", "gemma3", "paligemma",
    "gemma4", "idefics3", "smolvlm", "phi4_multimodal", "fuyu", "chameleon", "muse_spark",
    "gemma4_moe", "glm4v_moe", "mistral4", "aria", "qwen3_5_moe",
)  # fmt: skip


def check(family, **options):
    difference, from_dense, reasons = run(family, **options)
    assert reasons and set(reasons) <= {"", NARROWED}
    assert difference < 1e-5 and from_dense > 1e-4, "tokens that pass a layer must matter in this case"


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("family", DETAIL)
def test_tokens_pass_the_layers_of_a_family(family):
    check(family)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl_moe"])
def test_tokens_of_several_samples_pass_the_layers_of_a_family(family):
    check(family, batch=3)


@pytest.mark.models
@pytest.mark.parametrize("family", [one for one in OTHERS if "moe" in one or one in ("mistral4", "aria")])
def test_tokens_of_several_samples_pass_mixtures_of_experts_of_every_family(family):
    check(family, batch=2)


@pytest.mark.models
@pytest.mark.parametrize("family", OTHERS)
def test_tokens_pass_the_layers_of_every_family(family):
    check(family)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl_moe"])
def test_tokens_pass_layers_that_do_not_select(family):
    check(family, score_every=2)
