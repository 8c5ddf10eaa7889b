"""Models around models: peft, wrappers that lead to their model by odd ways, models that hand over to inner ones."""

from __future__ import annotations

import peft
import pytest
import torch
from support import tiny_llama, tiny_llava, tiny_models
from torch import nn

import zipvl_compile
from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.report.compile_report import collect

OPTIONS = {"min_tokens": 0, "inner": "eager"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def generate(f, x, **more):
    return f.generate(**x, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **more)


def assert_equal_tokens(f, eager, x):
    """Compare greedy tokens with those of an eager model."""
    assert torch.equal(generate(f, x).sequences, generate(eager, x).sequences)


def is_compacted(out) -> bool:
    kept = [positions.shape[2] for positions in zipvl_compile.kept_tokens(out)]
    return all(n < cache_of(out).get_seq_length() for n in kept)


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "up_proj"]


def with_adapters(model, target_modules=PROJECTIONS, **kind):
    """Return a peft model with two random adapters, the first active."""
    config = peft.LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False, **kind)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config, "first")
        adapted.add_adapter("second", config)
    for name, weight in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            weight.data.mul_(4)  # enough to change tokens
    return adapted.eval()


PROMPT = {"input_ids": tiny_llama.prompt()}


@pytest.mark.parametrize("tiny", [tiny_llama, tiny_llava], ids=["llama", "llava"])
def test_a_peft_model_is_compiled_where_its_generate_runs(tiny):
    f, eager = with_adapters(tiny.model()), with_adapters(tiny.model())
    x = PROMPT if tiny is tiny_llama else tiny_llava.inputs(text=20)
    assert zipvl_compile.compile(f, tau=1.0, **OPTIONS) == ["base_model.model"]
    with collect() as reports:
        assert_equal_tokens(f, eager, x)
    assert {site.kind for report in reports for site in report.rewritten} == {"prefill", "decode"}


def test_a_peft_model_is_compacted_below_tau_1():
    f = with_adapters(tiny_llama.model())
    zipvl_compile.compile(f, tau=0.6, **OPTIONS)
    assert is_compacted(generate(f, PROMPT))


def test_adapters_are_switched_disabled_and_merged():
    f, eager = with_adapters(tiny_llama.model()), with_adapters(tiny_llama.model())
    zipvl_compile.compile(f, tau=1.0, **OPTIONS)
    seen = [generate(f, PROMPT).sequences]
    assert_equal_tokens(f, eager, PROMPT)
    for each in (f, eager):
        each.set_adapter("second")
    assert_equal_tokens(f, eager, PROMPT)
    seen.append(generate(f, PROMPT).sequences)
    with f.disable_adapter(), eager.disable_adapter():
        assert_equal_tokens(f, eager, PROMPT)
        seen.append(generate(f, PROMPT).sequences)
    for each in (f, eager):
        each.merge_adapter()
    assert_equal_tokens(f, eager, PROMPT)
    for each in (f, eager):
        each.unmerge_adapter()
        each.set_adapter("first")
    assert_equal_tokens(f, eager, PROMPT)
    assert len({str(tokens) for tokens in seen}) == 3, "each adapter must change the answer"


def negate(f):
    for name, weight in f.named_parameters():
        if "lora_A.first" in name:
            weight.data.neg_()


CHANGES = {
    "switched": lambda f: f.set_adapter("second"),
    "both": lambda f: f.base_model.set_adapter(["first", "second"]),
    "disabled": lambda f: f.base_model.disable_adapter_layers(),
    "merged": lambda f: (f.base_model.enable_adapter_layers(), f.merge_adapter()),
    "weights changed": lambda f: (f.unmerge_adapter(), negate(f)),
}


def test_changed_adapters_keep_what_a_model_keeps_that_is_compiled_anew():
    """Of all projections, so that those are pruned that carry an adapter."""
    every = [*PROJECTIONS, "o_proj", "gate_proj", "down_proj"]
    f, other = (with_adapters(tiny_llama.model(num_hidden_layers=1), every) for _ in range(2))
    options = OPTIONS | {"policy": "paper", "keep_ratio": 0.5}
    with collect() as reports:
        zipvl_compile.compile(f, **options)
        seen = [str(generate(f, PROMPT).sequences)]
        for change in CHANGES.values():
            change(f)
            change(other)
            zipvl_compile.compile(other, **options)
            out, expected = generate(f, PROMPT), generate(other, PROMPT)
            assert torch.equal(out.sequences, expected.sequences) and is_compacted(out)
            for a, b in zip(zipvl_compile.kept_tokens(out), zipvl_compile.kept_tokens(expected), strict=True):
                assert torch.equal(a, b)
            seen.append(str(out.sequences))
    assert {one.done for report in reports for one in report.pruned} == {"q, v, output"}
    assert len(set(seen)) == 5, "all but merging must change the answer"


@pytest.mark.parametrize("policy", ["union", "paper"])
@pytest.mark.parametrize("merged", [False, True])
def test_dora_adapters_leave_the_prompt_dense_by_a_rule_of_zeros_unless_they_are_merged(merged, policy):
    """peft runs a function of theirs uncompiled in every projection, which ends graphs there."""
    f, other = (with_adapters(tiny_llama.model(), use_dora=True) for _ in range(2))
    if merged:
        f.merge_adapter()
    other.merge_adapter()
    rule = OPTIONS | {"keep_ratio": 0.5, "policy": policy}
    zipvl_compile.compile(f, **rule)
    zipvl_compile.compile(other, **rule, prefill="sparse" if merged or policy == "union" else "dense")
    with collect() as reports:
        out = generate(f, PROMPT)
    expected = generate(other, PROMPT)
    assert torch.equal(out.sequences, expected.sequences) and is_compacted(out)
    assert (max(len(report.sites) for report in reports) == 2) == merged


def test_the_merged_base_model_stays_compiled():
    f = with_adapters(tiny_llama.model())
    expected = generate(with_adapters(tiny_llama.model()), PROMPT).sequences
    zipvl_compile.compile(f, tau=1.0, **OPTIONS)
    with collect() as reports:
        assert torch.equal(generate(f.merge_and_unload(), PROMPT).sequences, expected)
    assert any(report.rewritten for report in reports)


class ByAlias(nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def generate(self, **x):
        inner = self.lm
        return inner.generate(**x)


class ByDictionary(ByAlias):
    def generate(self, **x):
        return {"text": self.lm}["text"].generate(**x)


class ByProperty(ByAlias):
    @property
    def decoder(self):
        return self.lm

    def generate(self, **x):
        return self.decoder.generate(**x)


class ByName(ByAlias):
    def generate(self, **x):
        call = getattr(getattr(self, "l" + "m"), "generate")  # noqa: B009
        return call(**x)


class ByModuleDict(ByAlias):
    def __init__(self, lm):
        nn.Module.__init__(self)
        self.parts = nn.ModuleDict({"lm": lm})

    def generate(self, **x):
        return self.parts["lm"].generate(**x)


@pytest.mark.parametrize("wrapper", [ByAlias, ByDictionary, ByProperty, ByName, ByModuleDict])
def test_a_wrapper_is_compiled_where_its_generate_runs_however_it_gets_there(wrapper):
    f = wrapper(tiny_llama.model())
    (path,) = zipvl_compile.compile(f, tau=0.6, **OPTIONS)
    assert path in ("lm", "parts.lm")
    assert is_compacted(generate(f, PROMPT))


class BesideAnother(ByAlias):
    """Holds a model that it never runs."""

    def __init__(self, lm):
        super().__init__(lm)
        self.draft = tiny_llama.model()


def test_a_model_that_is_never_run_is_compiled_at_no_cost():
    f = BesideAnother(tiny_llama.model())
    assert zipvl_compile.compile(f, tau=0.6, **OPTIONS) == ["lm", "draft"]
    assert is_compacted(generate(f, PROMPT))


def test_wrappers_around_peft_are_seen_through():
    f, eager = ByProperty(with_adapters(tiny_llama.model())), with_adapters(tiny_llama.model())
    assert zipvl_compile.compile(f, tau=1.0, **OPTIONS) == ["lm.base_model.model"]
    assert_equal_tokens(f, eager, PROMPT)


@pytest.mark.parametrize("family", ["blip_2", "kosmos_2"])
def test_a_model_that_hands_over_is_compacted(family):
    f = tiny_models.model(family)
    zipvl_compile.compile(f, tau=0.6, **OPTIONS)
    assert is_compacted(generate(f, tiny_models.inputs(family)))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_a_distributed_model_is_rewritten_whichever_way_its_graphs_are_split(process_group, tau):
    model = tiny_llama.model(intermediate_size=2048)  # 1.5 MB a layer: more than one of the buckets below
    f = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    with collect() as reports:
        out = torch.compile(f, backend="zipvl", options=OPTIONS | {"tau": tau})(**PROMPT, use_cache=True)
    assert [site.reason for report in reports for site in report.sites] == [None, None] and len(reports) > 1
    if tau == 1.0:
        torch.testing.assert_close(out.logits, model(**PROMPT).logits)
    else:
        assert is_compacted(out)


def test_accelerate_prepares_a_model_that_was_compiled():
    accelerate = pytest.importorskip("accelerate")
    f = tiny_llama.model()
    zipvl_compile.compile(f, tau=0.6, **OPTIONS)
    assert is_compacted(generate(accelerate.Accelerator(cpu=True).prepare(f), PROMPT))
