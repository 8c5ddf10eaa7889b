"""The cost model at work: measured constants, the default of min_tokens, predictions per layer."""

import dataclasses

import pytest
import torch
from support.tiny_llava import compiled, inputs, model

import zipvl_compile
from zipvl_compile.options import ZipVLOptions
from zipvl_compile.passes.cost_model import NEVER, AttentionShape, Machine, seconds
from zipvl_compile.report import costs as module
from zipvl_compile.report.compile_report import collect
from zipvl_compile.report.costs import (
    DENSE_FROM,
    MOST_CHOICE,
    WORST_LOSS,
    costs,
    least_tokens,
    multiply_adds,
    prefill_speedup,
)
from zipvl_compile.report.known_machines import known_machine

SHAPE = AttentionShape(1, 8, 2, 64, 64, 128, 4)
CPU = torch.device("cpu")
SLOW_SITE = Machine(attend=4e-11, edge=2e-9, multiply=2e-11, score=7e-9, token=4e-7, byte=3e-10, site=7e-4)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(module, "machine", lambda device, dtype: SLOW_SITE)


def test_the_option_wins():
    assert least_tokens(ZipVLOptions(min_tokens=7)) == 7
    assert least_tokens(ZipVLOptions(min_tokens=0)) == 0


def test_lengths_are_rounded_so_that_noise_decides_nothing(known):
    length = least_tokens(ZipVLOptions(keep_ratio=0.367))(SHAPE, torch.float32, CPU)
    assert length in (512, 768, 1024)
    assert least_tokens(ZipVLOptions(keep_ratio=0.9))(SHAPE, torch.float32, CPU) > length


def test_ranks_that_share_heads_decide_by_what_each_of_them_knows(monkeypatch):
    """Not by what each measured: ranks that decide differently wait for each other for ever."""
    monkeypatch.setattr(module, "machine", None)
    shared = dataclasses.replace(SHAPE, shared=True)
    length = least_tokens(ZipVLOptions(keep_ratio=0.367))(shared, torch.float32, CPU)
    monkeypatch.setattr(module, "machine", lambda device, dtype: known_machine(device, dtype))
    assert length == least_tokens(ZipVLOptions(keep_ratio=0.367))(SHAPE, torch.float32, CPU) < NEVER


@pytest.mark.parametrize(("rows", "saves"), [(1, True), (0, False)])
def test_nothing_is_saved_by_layers_that_no_token_may_pass(known, rows, saves):
    """Where all logits are asked for, every token goes through every layer."""
    explanation = zipvl_compile.explain(
        model(), options={"inner": "eager", "policy": "skip_layers", "dense_layers": 0}, logits_to_keep=rows,
        **inputs(text=20),
    )  # fmt: skip
    shapes = [row.shape for row in explanation.rows if row.kind == "prefill"]
    assert shapes and any(shape.work > 0 for shape in shapes) == saves


def test_a_tau_that_keeps_everything_costs_little(known):
    """From the least length on, keeping all tokens by `tau` takes little more than dense attention."""
    length = least_tokens(ZipVLOptions(tau=0.975))(SHAPE, torch.float32, CPU)
    assert length > least_tokens(ZipVLOptions(keep_ratio=0.5))(SHAPE, torch.float32, CPU)
    for n in (length, 2 * length, 10 * length):
        dense, sparse = seconds(SHAPE, SLOW_SITE, n, 1.0)
        assert sparse <= (1 + WORST_LOSS) * dense
    dense, sparse = seconds(SHAPE, SLOW_SITE, length // 2, 1.0)
    assert sparse > (1 + WORST_LOSS) * dense


def test_where_every_query_attends_keeping_nearly_all_costs_the_choice_alone(known):
    """Such a layer attends to all tokens (`dense_from`), so that shorter prompts are taken than by the cost of that."""
    among_kept = dataclasses.replace(SHAPE, every_query=True, local=68)
    union = dataclasses.replace(among_kept, dense_from=DENSE_FROM)
    length = least_tokens(ZipVLOptions(tau=0.975))(union, torch.float32, CPU)
    choice = dataclasses.replace(SLOW_SITE, attend=0.0, edge=0.0, byte=0.0)
    dense, sparse = seconds(among_kept, SLOW_SITE, length, DENSE_FROM)
    assert sparse <= (1 + WORST_LOSS) * dense and seconds(union, choice, length, 1.0)[1] <= MOST_CHOICE * dense
    dense, sparse = seconds(among_kept, SLOW_SITE, length, 1.0)
    assert sparse > (1 + WORST_LOSS) * dense


@pytest.mark.parametrize("others", [{"local": 0}, {"local": 68, "sparse_mask": True}], ids=["no window", "mask"])
def test_what_cannot_attend_to_all_must_pay_with_all_kept(known, others):
    """Without a window it is another operator, and a mask in memory keeps it from doing so."""
    shape = dataclasses.replace(SHAPE, every_query=True, **others)
    length = least_tokens(ZipVLOptions(tau=0.975))(shape, torch.float32, CPU)
    dense, sparse = seconds(shape, SLOW_SITE, length, 1.0)
    assert sparse <= (1 + WORST_LOSS) * dense


@pytest.mark.parametrize("options", [{"tau": 1.0}, {"keep_ratio": 1.0}])
def test_keeping_every_token_stays_dense(known, options):
    assert least_tokens(ZipVLOptions(**options))(SHAPE, torch.float32, CPU) == NEVER
    f, x = compiled(min_tokens=None, **options), inputs(text=20)
    with torch.no_grad(), collect() as reports:
        got, expected = f(**x).logits, model()(**x).logits
    torch.testing.assert_close(got, expected)
    sites = [site for report in reports for site in report.sites if site.kind == "prefill"]
    assert sites and all(site.by_design and "gains nothing" in str(site.reason) for site in sites)


@pytest.mark.parametrize(("site", "rewritten"), [(0.0, True), (7e-4, False)], ids=["free", "costly"])
def test_the_model_decides_for_each_prompt(monkeypatch, site, rewritten):
    speed = dataclasses.replace(SLOW_SITE, site=site, score=0.0, token=0.0, byte=0.0, multiply=0.0)
    monkeypatch.setattr(module, "machine", lambda device, dtype: speed)
    with torch.no_grad(), collect() as reports:
        compiled(min_tokens=None, policy="paper")(**inputs(text=20))
    sites = [site for report in reports for site in report.sites if site.kind == "prefill"]
    assert sites and all(site.rewritten == rewritten for site in sites)


@pytest.mark.parametrize("min_tokens", [None, 0])
def test_a_layer_that_keeps_nearly_all_attends_to_all_unless_a_length_was_given(monkeypatch, min_tokens):
    free = Machine(attend=1e-6, edge=1e-9, multiply=0.0, score=0.0, token=0.0, byte=0.0, site=0.0)
    monkeypatch.setattr(module, "machine", lambda device, dtype: free)
    monkeypatch.setattr(module, "WORST_LOSS", 9.0)
    f, x = compiled(min_tokens=min_tokens, keep_ratio=0.8, policy="union", window=1, sinks=0), inputs(text=20)
    with torch.no_grad(), collect() as reports:
        got, expected = f(**x).logits, model()(**x).logits
    assert any(site.rewritten for report in reports for site in report.sites if site.kind == "prefill")
    assert torch.allclose(got, expected, atol=1e-5) == (min_tokens is None)


def test_explain_predicts_every_layer(known):
    explanation = zipvl_compile.explain(
        model(), options={"min_tokens": 0, "inner": "eager", "tau": 0.8}, **inputs(text=20)
    )
    found = costs(explanation, torch.float32, CPU)
    rows = [row for row in explanation.rows if row.kind == "prefill"]
    assert [cost.layer for cost in found] == [row.layer for row in rows]
    for cost, row in zip(found, rows, strict=True):
        assert cost.kept == row.kept / row.prompt_length < 1
        assert cost.speedup == cost.dense / cost.sparse < 1, "a prompt this short gains nothing"
        assert cost.break_even > explanation.prompt_length and f"from {cost.break_even} tokens" in str(cost)


def test_a_layer_that_attends_to_all_is_predicted_so(known):
    union = dataclasses.replace(SHAPE, every_query=True, local=68, dense_from=DENSE_FROM)
    dense, sparse = seconds(union, SLOW_SITE, 4096, 0.9)
    _, besides = seconds(union, dataclasses.replace(SLOW_SITE, attend=0.0, edge=0.0), 4096, 0.9)
    assert sparse == pytest.approx(dense + besides) and besides > 0
    assert seconds(union, SLOW_SITE, 4096, 0.7)[1] < sparse
    _, gathers = seconds(union, Machine(0, 0, 0, 0, 0, SLOW_SITE.byte, 0), 4096, 0.9)
    assert gathers == pytest.approx(SLOW_SITE.byte * 4 * 2 * (64 + 64) * 0.9 * 4096), "of K and V for the cache"


@pytest.mark.parametrize(
    ("options", "dense_from"),
    [({}, DENSE_FROM), ({"min_tokens": 0}, float("inf")), ({"policy": "paper"}, float("inf"))],
    ids=["default", "a length", "kept queries"],
)
def test_explain_knows_which_attention_may_attend_to_all(known, options, dense_from):
    explanation = zipvl_compile.explain(model(), options={"inner": "eager", **options}, **inputs(text=20))
    rows = [row for row in explanation.rows if row.kind == "prefill"]
    assert rows and all(row.shape.dense_from == dense_from for row in rows)


def test_a_layer_multiplies_with_its_weights():
    llava = model()
    text = llava.config.text_config
    head_dim = llava.model.language_model.layers[0].self_attn.head_dim
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads)
    expected = heads * head_dim * text.hidden_size + 3 * text.hidden_size * text.intermediate_size
    assert multiply_adds(llava, "model.language_model.layers.1.self_attn") == expected
    assert multiply_adds(llava, "(scaled_dot_product_attention)") == 0


@pytest.mark.parametrize("skip", [False, True])
def test_explain_predicts_the_prefill_of_the_whole_decoder(monkeypatch, skip):
    """Where attention and its choice are free, what tokens pass is all that is gained."""
    speed = dataclasses.replace(
        SLOW_SITE, attend=0, edge=0, multiply=0, score=0, token=0, byte=0, site=0, product=1e-11
    )
    monkeypatch.setattr(module, "machine", lambda device, dtype: speed)
    options = {"min_tokens": 0, "inner": "eager", "keep_ratio": 0.5, "policy": "paper"}
    if skip:
        options |= {"policy": "skip_layers", "dense_layers": 0}
    explanation = zipvl_compile.explain(model(), options=options, **inputs(text=20))
    found = prefill_speedup(model(), explanation, torch.float32, CPU)
    rows = [row for row in explanation.rows if row.kind == "prefill"]
    whole = [multiply_adds(model(), row.layer) for row in rows]
    left = [w - row.shape.work * (1 - row.kept / row.prompt_length) for w, row in zip(whole, rows, strict=True)]
    assert found == pytest.approx(sum(whole) / sum(left)) and (found > 1.3) == skip
