"""One process, many compiled models: threads, modes of autograd and of Dynamo, two models, two sets of options."""

from __future__ import annotations

import threading

import pytest
import torch
from support import tiny_llama

import zipvl_compile
from zipvl_compile.cache.hf_names import as_argument, cache_of

OPTIONS = {"min_tokens": 0, "inner": "eager"}
PROMPT = tiny_llama.prompt()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(model, **options):
    model.compile(backend="zipvl", options=OPTIONS | options)
    return model


def generate(f, ids=PROMPT):
    return f.generate(input_ids=ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)


def kept(out) -> list[int]:
    return [positions.shape[2] for positions in zipvl_compile.kept_tokens(out)]


def test_two_threads_with_a_model_each():
    expected = [generate(tiny_llama.model(), tiny_llama.prompt(40, seed=i)).sequences for i in range(2)]
    models, got = [compiled(tiny_llama.model(), tau=1.0) for _ in range(2)], [None, None]

    def work(i):
        for _ in range(3):
            got[i] = generate(models[i], tiny_llama.prompt(40, seed=i)).sequences

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_two_threads_with_one_model():
    f, results = compiled(tiny_llama.model(), tau=0.6), []
    expected = [generate(f, tiny_llama.prompt(40, seed=i)) for i in range(2)]
    torch._dynamo.reset()
    threads = [
        threading.Thread(target=lambda i=i: results.append((i, generate(f, tiny_llama.prompt(40, seed=i)))))
        for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for i, out in results:
        assert torch.equal(out.sequences, expected[i].sequences) and kept(out) == kept(expected[i])


def test_two_models_with_two_sets_of_options_keep_to_their_own():
    sparse, exact, eager = (
        compiled(tiny_llama.model(), tau=0.6),
        compiled(tiny_llama.model(), tau=1.0),
        tiny_llama.model(),
    )
    for _ in range(2):  # the second time, all is compiled
        assert max(kept(generate(sparse))) < kept(generate(exact))[0] == PROMPT.shape[1] + 5
        assert torch.equal(generate(exact).sequences, generate(eager).sequences)


def test_options_changed_on_one_model_count_from_then_on():
    f = tiny_llama.model()
    for tau, every in ((0.6, False), (1.0, True), (0.6, False)):
        zipvl_compile.compile(f, tau=tau, **OPTIONS)
        assert (min(kept(generate(f))) == PROMPT.shape[1] + 5) is every


def test_beside_a_model_that_another_backend_compiles():
    sparse, other, eager = compiled(tiny_llama.model(), tau=0.6), tiny_llama.model(), tiny_llama.model()
    other.compile(backend="eager")
    for _ in range(2):
        assert max(kept(generate(sparse))) < PROMPT.shape[1]
        assert torch.equal(generate(other).sequences, generate(eager).sequences)


def test_the_same_after_torch_compiler_reset_also_in_the_middle_of_a_generation():
    f = torch.compile(tiny_llama.model(), backend="zipvl", options=OPTIONS | {"tau": 0.6})
    with torch.no_grad():
        token = torch.tensor([[9]])
        expected = f(input_ids=token, **as_argument(cache_of(f(input_ids=PROMPT, use_cache=True)))).logits
        torch.compiler.reset()
        cache = cache_of(f(input_ids=PROMPT, use_cache=True))
        torch.compiler.reset()
        assert torch.equal(f(input_ids=token, **as_argument(cache)).logits, expected)


@pytest.mark.parametrize("off", [torch.inference_mode, torch.no_grad])
def test_generation_and_a_loop_of_ones_own_without_gradients(off):
    f, expected = compiled(tiny_llama.model(), tau=1.0), generate(tiny_llama.model())
    with off():
        out = generate(f)
        assert torch.equal(out.sequences, expected.sequences)
        first = f(input_ids=PROMPT, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        second = f(input_ids=token, **as_argument(cache_of(first)), use_cache=True)
    answer = torch.cat([token, second.logits.argmax(-1)], 1)
    assert torch.equal(answer, expected.sequences[:, PROMPT.shape[1] :][:, :2])


def test_a_prompt_in_inference_mode_is_decoded_outside_of_it_and_back():
    f = compiled(tiny_llama.model(), tau=1.0)
    token = torch.tensor([[9]])
    with torch.no_grad():
        expected = tiny_llama.model()(input_ids=torch.cat([PROMPT, token], 1)).logits[:, -1:]
    with torch.inference_mode():
        cache = cache_of(f(input_ids=PROMPT, use_cache=True))
        got = f(input_ids=token, **as_argument(cache), use_cache=True).logits
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("given", [{"fullgraph": True}, {"dynamic": True}, {"dynamic": False}], ids=str)
def test_fullgraph_and_dynamic(given):
    eager, model = tiny_llama.model(), tiny_llama.model()
    model.compile(backend="zipvl", options=OPTIONS | {"tau": 1.0}, **given)
    for n in (40, 50):
        x = tiny_llama.prompt(n)
        assert torch.equal(generate(model, x).sequences, generate(eager, x).sequences)
    model.compile(backend="zipvl", options=OPTIONS | {"tau": 0.6}, **given)
    assert max(kept(generate(model))) < PROMPT.shape[1]


def test_options_are_checked_when_given_or_at_the_first_call_and_nothing_runs_by_bad_ones():
    f = tiny_llama.model()
    with pytest.raises(ValueError, match=r"zipvl option 'tau': expected a fraction in \(0, 1\], got 2\."):
        zipvl_compile.compile(f, tau=2)
    f.compile(
        backend="zipvl", options={"tau": 2}
    )  # PyTorch shows options to a backend when it compiles the first graph
    for _ in range(2):
        with pytest.raises(ValueError, match=r"zipvl option 'tau': expected a fraction in \(0, 1\], got 2\."):
            generate(f)
