"""Numbers of the budget that a user changes from request to request: nothing compiles anew, and each prompt obeys."""

import threading

import pytest
import torch
from support import tiny_llama
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llama import compiled

import zipvl_compile
from zipvl_compile.options import OptionError
from zipvl_compile.per_request import only_in, settings

N = 100


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()


def prefill(model):
    return model(tiny_llama.prompt(N), use_cache=True, logits_to_keep=1)


def kept(model):
    return [positions.shape[2] for positions in zipvl_compile.kept_tokens(prefill(model))]


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_number_equals_that_of_a_model_compiled_for_it(inner):
    model = compiled(tau=0.9, inner=inner)
    usual, before = kept(model), len(zipvl_compile.recent_reports())
    asked = [{"tau": 0.5}, {"keep_ratio": 0.3}, {"keep_tokens": 7}, {"floor": 0.95}, {"tau": 1.0}]
    found = []
    for numbers in asked:
        with settings(**numbers):
            found.append(prefill(model))
    assert kept(model) == usual
    assert len(zipvl_compile.recent_reports()) == before, "nothing was compiled"
    for numbers, output in zip(asked, found, strict=True):
        torch._dynamo.reset()
        options = numbers if "floor" not in numbers else numbers | {"tau": 0.9}
        expected = prefill(compiled(**options, inner=inner))
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
        pairs = zip(zipvl_compile.kept_tokens(output), zipvl_compile.kept_tokens(expected), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("options", [{"keep_ratio": 0.6}, {"keep_tokens": 50}], ids=str)
def test_a_model_compiled_for_a_fixed_number_takes_others(options):
    model = compiled(**options)
    usual = kept(model)
    assert usual == [60, 60] or usual == [50, 50]
    with settings(keep_ratio=0.25):
        assert kept(model) == [25, 25]
    with settings(tau=0.5):
        assert all(count < 60 for count in kept(model))


def test_blocks_nest_and_the_inner_one_decides():
    model = compiled(tau=0.9)
    kept(model)
    with settings(keep_ratio=0.3):
        assert kept(model) == [30, 30]
        with settings(floor=0.5):
            assert kept(model) == [50, 50], "the ratio of the outer block, and a floor"
        with settings(keep_tokens=4):
            assert kept(model) == [4, 4]
        assert kept(model) == [30, 30]


def test_another_thread_is_not_concerned():
    model = compiled(keep_ratio=0.5)
    kept(model)
    found = []
    with settings(keep_ratio=0.2):
        other = threading.Thread(target=lambda: found.append(torch.no_grad()(kept)(model)))
        other.start()
        other.join()
        assert kept(model) == [20, 20]
    assert found == [[50, 50]]


def test_generate_over_the_cache_that_a_request_asked_for():
    model, x = compiled(tau=0.9), tiny_llama.prompt(N)
    model.generate(x, max_new_tokens=4, do_sample=False)
    with settings(tau=1.0):
        found = model.generate(x, max_new_tokens=8, do_sample=False)
    assert found.tolist() == tiny_llama.model().generate(x, max_new_tokens=8, do_sample=False).tolist()


def test_a_model_that_keeps_every_token_says_so():
    model = compiled(tau=1.0)
    kept(model)
    with settings(tau=0.5), pytest.raises(OptionError, match=r"got tau=0\.5 for one that was compiled"):
        kept(model)
    assert kept(model) == [N, N]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"tau": 0.0}, r"option 'tau': expected a fraction"),
        ({"keep_tokens": 0}, r"option 'keep_tokens': expected None or an integer of at least 1"),
        ({"floor": 2}, r"option 'floor': expected a fraction in \[0, 1\]"),
        ({"tau": 0.5, "keep_ratio": 0.5}, "expected one of them"),
    ],
    ids=str,
)
def test_bad_numbers(numbers, text):
    with pytest.raises(OptionError, match=text), settings(**numbers):
        raise AssertionError("the block must not run")


def test_only_some_layers_select():
    model = compiled(keep_ratio=0.3)
    assert kept(model) == [30, 30]
    before = len(zipvl_compile.recent_reports())
    with only_in([1]):
        assert kept(model) == [N, 30]
        with settings(keep_ratio=0.5):
            assert kept(model) == [N, 50]
    with only_in([]):
        out = prefill(model)
        torch.testing.assert_close(out.logits, prefill(tiny_llama.model()).logits, rtol=1e-4, atol=1e-5)
    assert kept(model) == [30, 30] and len(zipvl_compile.recent_reports()) == before
