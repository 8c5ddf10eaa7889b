"""The ways to call `generate`: at `tau=1` the eager model's tokens, below it as many, over a smaller cache."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from support.tiny_llava import BOS, IMAGE, compiled, inputs, model, shared
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, TextStreamer
from transformers.generation import LogitsProcessor, StoppingCriteria

from zipvl_compile.cache.hf_names import cache_of

NEW = 6


class OnlyEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


class AfterFour(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        n = inputs(text=20)["input_ids"].shape[1]
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= n + 4)


def no_images(batch, input_ids):
    return list(range(6, 128))


WAYS = {
    "greedy": {},
    "greedy, settings in a config": {"generation_config": GenerationConfig(max_new_tokens=NEW, pad_token_id=0)},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, all returned": {"num_beams": 3, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "logits processor": {"logits_processor": LogitsProcessorList([OnlyEven()])},
    "allowed tokens": {"prefix_allowed_tokens_fn": no_images},
    "bad words": {"bad_words_ids": [[7], [9, 11]]},
    "stopping criteria": {"stopping_criteria": StoppingCriteriaList([AfterFour()])},
    "without a cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "an end token": {"eos_token_id": list(range(0, 128, 5))},
}
BY_DESIGN_DENSE = {"without a cache"}


def run(f, x, **how):
    torch.manual_seed(3)
    return f.generate(**x, **{"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True} | how)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate(way):
    x = inputs(text=20)
    expected = run(model(), x, **WAYS[way])
    assert torch.equal(run(shared(tau=1.0), x, **WAYS[way]).sequences, expected.sequences)
    sparse = run(shared(tau=0.7), x, **WAYS[way])
    assert sparse.sequences.shape[0] == expected.sequences.shape[0]
    if way in BY_DESIGN_DENSE:
        assert torch.equal(sparse.sequences, expected.sequences)
    else:
        assert all(layer.positions.shape[2] < layer.prompt_length for layer in cache_of(sparse).layers)


def test_scores_and_hidden_states_are_those_of_the_eager_model():
    x = inputs(text=20)
    how = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    got, expected = run(shared(tau=1.0), x, **how), run(model(), x, **how)
    for a, b in zip(got.scores + got.logits, expected.scores + expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert [h.shape for h in a] == [h.shape for h in b]
        for h, k in zip(a, b, strict=True):
            torch.testing.assert_close(h, k, atol=2e-5, rtol=1e-4)


def test_attention_weights_are_asked_for_in_eager_attention_and_stay_right():
    x = inputs(text=9)

    def made():
        f = model()
        f.set_attn_implementation("eager")
        return f

    f = made()
    f.compile(backend="zipvl", options={"inner": "eager", "min_tokens": 0, "tau": 1.0})
    got, expected = (run(g, x, output_attentions=True, max_new_tokens=3) for g in (f, made()))
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        for w, v in zip(a, b, strict=True):
            torch.testing.assert_close(w, v, atol=2e-5, rtol=1e-4)


def test_tuples_instead_of_outputs():
    x = inputs(text=20)
    with torch.no_grad():
        got, expected = (f(**x, return_dict=False)[0] for f in (shared(tau=1.0), model()))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_tokens_are_streamed_as_they_come():
    class Words:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids))

    said = []
    for f in (shared(tau=1.0), model()):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            f.generate(
                **inputs(text=20), max_new_tokens=NEW, do_sample=False, streamer=TextStreamer(Words(), skip_prompt=True)
            )
        said.append(out.getvalue())
    assert said[0] == said[1] and len(said[0].split()) == NEW


def test_a_generation_loop_of_ones_own():
    def loop(model, input_ids, generation_config, **kwargs):
        tokens = model.generate(
            input_ids=input_ids, **{k: v for k, v in kwargs.items() if k in ("pixel_values", "attention_mask")},
            max_new_tokens=NEW, do_sample=False,
        )  # fmt: skip
        return torch.cat([tokens, torch.zeros_like(tokens[:, :1])], 1)

    x = inputs(text=20)
    got, expected = (f.generate(**x, custom_generate=loop) for f in (shared(tau=1.0), model()))
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_a_thousand_tokens():
    x = inputs(text=20)
    f = compiled(tau=1.0)
    got, expected = (g.generate(**x, max_new_tokens=1000, do_sample=False) for g in (f, model()))
    assert torch.equal(got, expected)


def test_text_alone_and_images_alone():
    words = torch.cat([torch.full((1, 1), BOS), torch.randint(6, 128, (1, 70))], 1)
    picture = inputs(text=0)
    for x in ({"input_ids": words}, picture):
        assert IMAGE not in words and torch.equal(run(shared(tau=1.0), x).sequences, run(model(), x).sequences)
        assert run(shared(tau=0.7), x).sequences.shape[1] == x["input_ids"].shape[1] + NEW
