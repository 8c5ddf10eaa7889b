"""Whose logits are read must attend: assisted and lookup decoding, scoring, ranking, perplexity, labels.

Each is compared with what transformers gives without compiling. The LLaVA has a graph break between its decoder and its
head; the Llama is one graph.
"""

import copy

import pytest
import torch
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llava import compiled, inputs, model, prefill
from transformers import LlamaConfig, LlamaForCausalLM

import zipvl_compile
from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.demo.prompts import load, prompt_inputs
from zipvl_compile.demo.tiny_lvlm import CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.evaluate import exact_match, questions_for_demo
from zipvl_compile.report.compile_report import collect

OPTIONS = {"inner": "eager", "min_tokens": 0}
TAU = {"policy": "paper", "tau": 0.9}


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()


def noisy(f, noise):
    """Return a draft model: the same weights and some noise."""
    draft, generator = copy.deepcopy(f), torch.Generator().manual_seed(0)
    for weight in draft.model.language_model.parameters():
        weight.data += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return draft


def generated(f, x, **how):
    return f.generate(**x, max_new_tokens=12, do_sample=False, **how)


def llama(**options):
    """Return a tiny Llama whose answers depend on attention, compiled where there are options."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        f = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=1,
            )
        ).eval()  # fmt: skip
        for weight in f.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5)
    if options:
        f.compile(backend="zipvl", options=OPTIONS | options)
    return f


def words(n=200):
    return torch.randint(2, 90, (1, n), generator=torch.Generator().manual_seed(1))


def off(got, expected):
    """Return the largest difference of a log-probability, by row."""
    return (got.log_softmax(-1) - expected.log_softmax(-1)).abs().amax((0, 2))


WAYS = {
    "a close draft": lambda f: {"assistant_model": noisy(f, 0.02)},
    "a bad draft": lambda f: {"assistant_model": noisy(f, 1.0)},
    "lookup": lambda f: {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_decoding_with_drafts_is_greedy_decoding_at_tau_1(way):
    x = inputs(text=20)
    eager = model()
    expected = generated(eager, x)
    assert len(expected[0, -12:].unique()) > 3
    assert torch.equal(generated(eager, x, **WAYS[way](eager)), expected)
    assert torch.equal(generated(compiled(tau=1.0), x, **WAYS[way](eager)), expected)


@pytest.mark.parametrize("way", WAYS)
def test_decoding_with_drafts_answers_as_greedy_decoding_does(way):
    """A draft is judged in the first forward, by rows of the prompt, and then over the compacted cache."""
    f, processor = load(str(CHECKPOINT), "cpu")
    asked = [(q, prompt_inputs(processor, q.image, q.prompt)) for q in questions_for_demo(24, seed=1)]
    how = WAYS[way](f) if way != "a bad draft" else {"assistant_model": noisy(f, 0.3)}
    f.compile(backend="zipvl", options=OPTIONS | {"tau": 0.975})

    def right(**how):
        texts = [generated(f, x, **how)[0, x["input_ids"].shape[1] :] for _, x in asked]
        answers = processor.batch_decode(texts, skip_special_tokens=True)
        return [exact_match(a, q.answer) for a, (q, _) in zip(answers, asked, strict=True)]

    assert sum(right(**how)) >= sum(right())


@pytest.mark.parametrize("count", [1, 5, 12])
def test_rows_that_are_scored_are_kept_and_attend(count):
    """As with the option that protects them, to the last bit; row by row about as near to eager as the newest one."""
    ids = words()
    got = llama(**TAU)(ids, logits_to_keep=count, use_cache=True)
    torch._dynamo.reset()
    protected = llama(keep_recent=count, **TAU)(ids, logits_to_keep=count, use_cache=True)
    assert torch.equal(got.logits, protected.logits)
    for kept in zipvl_compile.kept_tokens(got):
        assert kept.shape[2] < ids.shape[1] and kept[0, 0, -count:].tolist() == [*range(200 - count, 200)]
    far = off(got.logits, llama()(ids).logits[:, -count:])
    assert far.max() < 4 * max(far[-1].item(), 0.25)


def test_rows_that_are_scored_behind_a_graph_break():
    x, count = inputs(text=60), 12
    got = prefill(compiled(**TAU), x | {"logits_to_keep": count})
    assert got.logits.shape[1] == count
    for kept in zipvl_compile.kept_tokens(got):
        n = x["input_ids"].shape[1]
        assert kept.shape[2] < n and kept[0, 0, -count:].tolist() == [*range(n - count, n)]
    expected = prefill(model(), x).logits[:, -count:]
    far, unprotected = off(got.logits, expected), off(prefill(compiled(**TAU), x).logits[:, -count:], expected)
    assert far.mean() < 1.5 * unprotected.mean(), "no worse than where every query attends"


def test_numbers_of_scored_rows_share_a_graph():
    f = llama(**TAU)
    with collect() as reports:
        for count in (1, 3, 5, 8, 13):
            f(words(), logits_to_keep=count, use_cache=True)
    assert [report.demanded != "" for report in reports] == [False, True], "one row, and any other number"


@pytest.mark.parametrize("rows", [[180, 40, 199], [-1, -150]], ids=str)
def test_rows_of_an_index_tensor(rows):
    rows = torch.tensor(rows)
    got = llama(**TAU)(words(), logits_to_keep=rows, use_cache=True)
    for kept in zipvl_compile.kept_tokens(got):
        assert kept.shape[2] < 200 and set((rows % 200).tolist()) <= set(kept.flatten().tolist())
    torch._dynamo.reset()
    assert torch.allclose(
        llama(tau=1.0)(words(), logits_to_keep=rows).logits, llama()(words()).logits[:, rows], atol=1e-4
    )


READ_IN_FULL = {
    "all logits": lambda f, ids: f(ids, use_cache=True),
    "a loss": lambda f, ids: f(ids, labels=ids, use_cache=True),
    "hidden states": lambda f, ids: f(ids, output_hidden_states=True, logits_to_keep=1, use_cache=True),
}


@pytest.mark.parametrize("form", READ_IN_FULL)
def test_where_all_rows_are_read_every_query_attends(form):
    ids = words()
    with collect() as reports:
        got = READ_IN_FULL[form](llama(**TAU), ids)
    assert all("every query attends" in report.demanded for report in reports if report.rewritten)
    torch._dynamo.reset()
    asked = READ_IN_FULL[form](llama(unselected="all", **TAU), ids)
    assert torch.equal(got.logits, asked.logits)
    assert all(layer.positions.shape[2] < 200 for layer in cache_of(got).layers)


def test_perplexity_is_near_that_of_eager():
    ids = words()
    expected = llama()(ids, labels=ids).loss
    assert abs(llama(**TAU)(ids, labels=ids, use_cache=True).loss - expected) < 0.05 * expected


def test_calls_that_read_other_rows_do_not_change_what_greedy_decoding_gives():
    x = inputs(text=20)
    expected = generated(compiled(**TAU), x)
    torch._dynamo.reset()
    f = compiled(**TAU)
    for count in (0, 5):
        prefill(f, x | {"logits_to_keep": count})
    assert torch.equal(generated(f, x), expected)


def test_explain_says_which_rows_attend():
    x = inputs(text=20)
    assert "attend" not in str(zipvl_compile.explain(model(), **x, options=OPTIONS | TAU))
    said = str(zipvl_compile.explain(model(), **x, options=OPTIONS | TAU, logits_to_keep=0))
    assert "Every query attends: all rows of the hidden state are read" in said
    said = str(zipvl_compile.explain(llama(), input_ids=words(), options=OPTIONS | TAU, logits_to_keep=5))
    assert "rows slice(-5, None, None)" in said
