"""Prompts as people write them: at `tau=1` the eager model's logits, below it finite ones of the same shape."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models
from support.tiny_llava import BOS, IMAGE, IMAGE_TOKENS, PAD, compiled, inputs, model, prompt_cache, shared, step
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from zipvl_compile.cache.hf_names import as_argument, cache_of

CLOSE = {"atol": 3e-5, "rtol": 1e-4}
PICTURE = [IMAGE] * IMAGE_TOKENS


def words(n, seed=0):
    return torch.randint(6, 128, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch(*rows, pixels):
    """Return inputs of token lists, padded on the left, with that many images."""
    n = max(map(len, rows))
    ids = torch.tensor([[PAD] * (n - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (n - len(row)) + [1] * len(row) for row in rows])
    images = torch.randn(pixels, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask} | ({"pixel_values": images} if pixels else {})


def hole_in_the_mask():
    x = inputs(text=20)
    x["attention_mask"][0, 30:37] = 0
    return x


def positions_of_ones_own():
    x = inputs(text=20)
    n = x["input_ids"].shape[1]
    return x | {"position_ids": torch.arange(n)[None] * 2 + 5}


def mask_of_four_axes():
    x = inputs(text=20)
    n = x["input_ids"].shape[1]
    causal = torch.ones(n, n).tril().bool()
    causal[:, 40:44] &= torch.eye(n).bool()[:, 40:44]
    x["attention_mask"] = torch.zeros(1, 1, n, n).masked_fill(~causal, torch.finfo(torch.float32).min)
    return x


def embeddings_instead_of_tokens():
    ids = torch.tensor([[BOS, *words(80)]])
    with torch.no_grad():
        return {"inputs_embeds": model().get_input_embeddings()(ids)}


PROMPTS = {
    "an image and a question": lambda: batch([BOS, *PICTURE, *words(20)], pixels=1),
    "an image and no text": lambda: batch([BOS, *PICTURE], pixels=1),
    "two images": lambda: batch([BOS, *PICTURE, *words(5), *PICTURE, *words(9)], pixels=2),
    "rows with one image and two": lambda: batch(
        [BOS, *PICTURE, *words(30)], [BOS, *PICTURE, *words(3), *PICTURE, *words(9, 1)], pixels=3
    ),
    "a row with an image and one without": lambda: batch([BOS, *PICTURE, *words(9)], [BOS, *words(15)], pixels=1),
    "rows of very unlike lengths": lambda: batch([BOS, *words(3)], [BOS, *words(90)], pixels=0),
    "text alone": lambda: batch([BOS, *words(70)], pixels=0),
    "one token": lambda: batch([BOS], pixels=0),
    "two tokens": lambda: batch([BOS, 9], pixels=0),
    "a hole in the mask": hole_in_the_mask,
    "positions of one's own": positions_of_ones_own,
    "a mask of four axes": mask_of_four_axes,
    "embeddings instead of tokens": embeddings_instead_of_tokens,
    "padding on the right": lambda: inputs(batch=2, text=20, pad=7, side="right"),
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt(prompt):
    x = PROMPTS[prompt]()
    shown = x["attention_mask"][:, -1] if "attention_mask" in x and x["attention_mask"].dim() == 2 else slice(None)
    with torch.no_grad():
        expected, every, sparse = (f(**x, logits_to_keep=1).logits for f in (model(), shared(tau=1.0), shared(tau=0.6)))
    rows = shown.bool() if isinstance(shown, torch.Tensor) else shown  # what stands on padding is nobody's
    torch.testing.assert_close(every[rows], expected[rows], **CLOSE)
    assert sparse.shape == expected.shape and sparse[rows].isfinite().all()


def test_a_row_that_is_all_padding_spoils_no_other_row():
    x = inputs(batch=2, text=20)
    alone = {name: value[1:] for name, value in x.items()}
    x["attention_mask"][0] = 0
    with torch.no_grad():
        expected = model()(**alone, logits_to_keep=1).logits
        got = shared(tau=1.0)(**x, logits_to_keep=1).logits
        assert shared(tau=0.6)(**x, logits_to_keep=1).logits[1].isfinite().all()
    torch.testing.assert_close(got[1:], expected, **CLOSE)


def test_padding_changes_no_answer():
    row, other = [BOS, *PICTURE, *words(20)], [BOS, *PICTURE, *words(33, 1)]
    f = shared(tau=1.0)
    alone = f.generate(**batch(row, pixels=1), max_new_tokens=6, do_sample=False)[0, -6:]
    x = batch(row, other, pixels=2)
    x["pixel_values"][0] = batch(row, pixels=1)["pixel_values"][0]
    assert torch.equal(f.generate(**x, max_new_tokens=6, do_sample=False)[0, -6:], alone)


def in_parts(f, x, cuts):
    """Run a text prompt in parts over one cache and return the last logits and the cache."""
    cache, ids = None, x["input_ids"]
    for part in torch.tensor_split(ids, cuts, dim=1):
        with torch.no_grad():
            out = f(input_ids=part, use_cache=True, **({} if cache is None else as_argument(cache)))
        cache = cache_of(out)
    return out.logits[:, -1], cache


@pytest.mark.parametrize("cuts", [[4], [40], [30, 60]], ids=str)
def test_a_prompt_in_chunks_is_the_prompt(cuts):
    x = batch([BOS, *words(90)], pixels=0)
    expected, _ = in_parts(model(), x, [])
    got, cache = in_parts(shared(tau=1.0), x, cuts)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert cache.get_seq_length() == 91
    torch.testing.assert_close(
        step(shared(tau=1.0), torch.tensor([[9]]), cache).logits,
        step(model(), torch.tensor([[9]]), in_parts(model(), x, [])[1]).logits, **CLOSE,
    )  # fmt: skip


def test_a_system_prompt_that_was_cached_first():
    system = batch([BOS, *words(60)], pixels=0)
    question = inputs(text=9)
    logits = []
    for f in (shared(tau=1.0), model()):
        cache = prompt_cache(f, system)
        mask = torch.ones(1, 61 + question["input_ids"].shape[1], dtype=torch.long)
        with torch.no_grad():
            x = question | {"attention_mask": mask}
            logits.append(f(**x, **as_argument(cache), use_cache=True, logits_to_keep=1).logits)
    torch.testing.assert_close(*logits, **CLOSE)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_second_turn_with_positions_of_three_axes(family):
    x = tiny_models.inputs(family)
    tokens = []
    for f in (tiny_models.compiled(family, tau=1.0), tiny_models.model(family)):
        out = f.generate(**x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([[9, 10, 11]])], 1)
        tokens.append(f.generate(ids, **as_argument(cache_of(out)), max_new_tokens=4, do_sample=False))
    assert torch.equal(*tokens)


def decoder(kind, config, **extra):
    torch.manual_seed(0)
    config = config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, **extra,
    )  # fmt: skip
    built = kind(config).eval()
    for p in built.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return built


DECODERS = {
    "dynamic NTK beyond its length": lambda: decoder(
        LlamaForCausalLM, LlamaConfig, max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "a window wider than the prompt": lambda: decoder(MistralForCausalLM, MistralConfig, sliding_window=200),
    "a window narrower than the prompt": lambda: decoder(MistralForCausalLM, MistralConfig, sliding_window=16),
}  # fmt: skip


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_that_look_at_the_length(kind):
    x = batch([BOS, *words(60)], pixels=0)
    f = DECODERS[kind]()
    expected = f.generate(**x, max_new_tokens=8, do_sample=False)
    torch._dynamo.reset()
    f.compile(backend="zipvl", options={"inner": "eager", "min_tokens": 0, "tau": 1.0})
    assert torch.equal(f.generate(**x, max_new_tokens=8, do_sample=False), expected)


def test_a_prompt_of_not_a_number_is_not_a_number_and_breaks_nothing():
    f = compiled(tau=0.7)
    x = inputs(text=20)
    bad = x | {"pixel_values": x["pixel_values"] * float("nan")}
    with torch.no_grad():
        assert f(**bad, logits_to_keep=1).logits.isnan().all()
        assert f(**x, logits_to_keep=1).logits.isfinite().all()


def test_a_hundred_lengths_compile_nothing_more():
    from zipvl_compile.report.compile_report import collect

    f = shared(tau=0.7)
    for n in (30, 41):
        f.generate(**batch([BOS, *words(n)], pixels=0), max_new_tokens=3, do_sample=False)
    with collect() as later:
        for n in range(20, 120):
            f.generate(**batch([BOS, *words(n, n)], pixels=0), max_new_tokens=2, do_sample=False)
    assert later == []
