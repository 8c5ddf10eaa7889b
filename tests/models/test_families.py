"""Every family of vision-language models: equal to eager at tau=1, compacted below it, every site accounted for.

`make test` runs the families in DETAIL through everything and the others through one padded generate;
`make test-models` runs every family through everything and writes docs/models.md.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from families.family import REWRITTEN
from families.run import generate, problems, prompts, run
from support.tiny_models import FAMILIES, VOCAB, compiled, inputs, model

from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.compiling import generating_modules
from zipvl_compile.report.compile_report import collect

pytestmark = pytest.mark.slow
DETAIL = ("llava", "qwen2_5_vl", "gemma3", "gemma3n", "paligemma", "idefics3", "mllama", "git")
# Their compiles take a minute or more: `make test-models` runs them.
LONG = (
    "glm5_next",
    "qwen4_exp",
    "evolla",
    "chameleon",
    "emu3",
    "mistral_large4",
    "dots3_note",
    "unlimited_ocr",
    "inkling2",
)
NEW_TOKENS = 8


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _runs_in_eager(request):
    family = request.node.callspec.params["family"] if hasattr(request.node, "callspec") else "llava"
    broken = FAMILIES[family].broken_in
    if broken and "compile_finds" not in request.node.name and transformers.__version__.startswith(broken):
        pytest.skip(f"{family} fails in eager mode, too, with transformers {transformers.__version__}")


@pytest.mark.parametrize("family", DETAIL)
def test_everything(family):
    assert problems(run(family)) == []


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_of_every_family(family):
    result = run(family)
    result.save()
    assert problems(result) == []


@pytest.mark.parametrize("family", [f for f, kind in FAMILIES.items() if f not in DETAIL + LONG and kind.generates])
def test_a_generate_equals_eager_at_tau_1_and_every_site_is_accounted_for(family):
    name, x = list(prompts(family).items())[-1]
    with collect() as reports:
        got = generate(compiled(family, tau=1.0), x).sequences
    assert torch.equal(got, generate(model(family), x).sequences), f"{name} differs from eager"
    prefill = [site for report in reports for site in report.sites if site.kind == "prefill"]
    expected = FAMILIES[family].decoder
    assert sum(site.rewritten for site in prefill) == expected.count(REWRITTEN)
    reasons = tuple(reason for reason in expected if reason != REWRITTEN) or ("nothing",)
    assert [site for site in prefill if not site.rewritten and not str(site.reason).startswith(reasons)] == []


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "gemma3n", "paligemma", "idefics3", "mistral3"])
def test_cache_below_tau_1_is_compacted_and_never_holds_padding(family):
    pad = 5
    f, x = compiled(family, tau=0.8), inputs(family, batch=2, text=14, pad=pad, seed=3)
    with collect() as reports:
        out = generate(f, x, output_logits=True)
    n = x["input_ids"].shape[1]
    assert out.sequences.shape == (2, n + NEW_TOKENS)
    assert out.sequences.min() >= 0 and out.sequences.max() < VOCAB
    assert all(logits.isfinite().all() for logits in out.logits)
    compact = [layer for layer in cache_of(out).layers if isinstance(layer, CompactLayer)]
    assert compact and all(layer.get_seq_length() == n + NEW_TOKENS - 1 for layer in compact)
    for layer in compact:
        assert layer.prompt_length == n
        assert layer.positions.shape[2] < 0.9 * n
        assert layer.positions[0].min() >= pad, "padding is never important"
        assert layer.cached_length == layer.positions.shape[2] + NEW_TOKENS - 1
    sites = [site for report in reports for site in report.sites]
    for kind in ("prefill", "decode"):
        names = {site.layer for site in sites if site.kind == kind and site.rewritten}
        assert len(names) == FAMILIES[family].decoder.count(REWRITTEN)
    assert all(site.by_design for site in sites if not site.rewritten)
    said = [str(one) for report in reports for one in report.pruned]
    assert said and not [line for line in said if "the attention is dense" in line]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "internvl"])
def test_eager_attention_is_rewritten_too(family):
    f, eager = compiled(family, tau=1.0), model(family, attention="eager")
    f.set_attn_implementation("eager")
    for x in prompts(family).values():
        with collect() as reports:
            got = generate(f, x).sequences
        assert torch.equal(got, generate(eager, x).sequences)
        prefill = [site for report in reports for site in report.sites if site.kind == "prefill"]
        assert sum(site.rewritten for site in prefill) == FAMILIES[family].decoder.count(REWRITTEN)


def test_there_are_at_least_forty_five_families():
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    assert len({type(model(family)).__name__ for family in FAMILIES} & set(NAMES.values())) >= 45


@pytest.mark.parametrize("family", FAMILIES)
def test_compile_finds_the_module_that_generates(family):
    """What hands over to it may be among them: it can generate, too, and compiling it costs nothing."""
    if family == "diffusion_gemma":  # a loop of its own
        with pytest.raises(ValueError, match=r"path: expected where DiffusionGemma\w+\.generate calls a model"):
            generating_modules(model(family))
        return
    # UDOP generates itself, but its encoder cannot be traced by any backend: its tests compile the decoder.
    expected = "" if family == "udop" else FAMILIES[family].inner
    found = generating_modules(model(family))
    assert expected in found and set(found) <= {"", expected}
