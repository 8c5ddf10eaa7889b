"""What needs gradients gets the true ones; everything else is inference, with or without `torch.no_grad()`."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import tiny_llama, tiny_llava
from torch import nn

from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.report import compile_report
from zipvl_compile.report.compile_report import collect

OPTIONS = {"tau": 0.6, "min_tokens": 0, "inner": "eager"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    compile_report._warned.clear()


def compiled(model, **options):
    return torch.compile(model, backend="zipvl", options=OPTIONS | options)


def is_sparse(out) -> bool:
    """Return whether a prompt was compacted, and nothing of it can be differentiated."""
    layers = cache_of(out).layers
    dropped = [getattr(x, "positions", None) is not None and x.positions.shape[2] < x.prompt_length for x in layers]
    assert len(set(dropped)) == 1, "layers disagree"
    return dropped[0] and not out.logits.requires_grad


def gradients(f, x, *wanted):
    """Return the gradients of `wanted` for a loss over all logits, and the output."""
    out = f(**x, use_cache=True)
    return torch.autograd.grad(out.logits.square().mean(), wanted), out


def assert_same_gradients(f, eager, x, *wanted, of=None):
    got, out = gradients(f, x, *wanted)
    expected, _ = gradients(eager, x, *(of or wanted))
    for a, b in zip(got, expected, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    return out


needs_gradients = pytest.mark.filterwarnings("ignore:zipvl leaves .* gradients are on:UserWarning")


@pytest.mark.parametrize("tiny", [tiny_llama, tiny_llava], ids=["llama", "llava"])
def test_a_manual_loop_in_eval_mode_is_sparse_without_no_grad(tiny):
    x = {"input_ids": tiny_llama.prompt()} if tiny is tiny_llama else tiny_llava.inputs(text=20)
    assert all(p.requires_grad for p in tiny.model().parameters())
    assert is_sparse(compiled(tiny.model())(**x, use_cache=True))


@needs_gradients
def test_an_image_that_requires_gradients_gets_the_true_ones():
    x = tiny_llava.inputs(text=20)
    x["pixel_values"].requires_grad_()
    assert not is_sparse(assert_same_gradients(compiled(tiny_llava.model()), tiny_llava.model(), x, x["pixel_values"]))


@needs_gradients
@pytest.mark.parametrize("kind", [nn.Parameter, lambda x: x.clone().requires_grad_()], ids=["parameter", "tensor"])
def test_a_soft_prompt_in_eval_mode_is_learned(kind):
    model = tiny_llama.model()
    soft = kind(torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(3)) * 0.15)
    words = model.get_input_embeddings()(tiny_llama.prompt()).detach()
    out = assert_same_gradients(compiled(model), model, {"inputs_embeds": torch.cat([soft, words], 1)}, soft)
    assert not is_sparse(out)


@needs_gradients
def test_the_same_function_first_without_then_with_gradients_and_back():
    model = tiny_llama.model()
    f, x = compiled(model), {"inputs_embeds": model.get_input_embeddings()(tiny_llama.prompt()).detach()}
    assert is_sparse(f(**x, use_cache=True))
    wanted = {"inputs_embeds": x["inputs_embeds"].clone().requires_grad_()}
    assert_same_gradients(f, model, wanted, wanted["inputs_embeds"])
    assert is_sparse(f(**x, use_cache=True))
    with torch.no_grad():
        assert is_sparse(f(**wanted, use_cache=True))


@needs_gradients
@pytest.mark.parametrize("tiny", [tiny_llama, tiny_llava], ids=["llama", "llava"])
def test_a_student_in_train_mode_learns(tiny):
    x = {"input_ids": tiny_llama.prompt()} if tiny is tiny_llama else tiny_llava.inputs(text=20)
    student, eager = tiny.model().train(), tiny.model().train()
    used = [name for name, _ in eager.named_parameters() if "vision_tower" not in name]
    wanted, same = ([dict(m.named_parameters())[name] for name in used] for m in (student, eager))
    assert_same_gradients(compiled(student, inner="aot_eager"), eager, x, *wanted, of=same)


@needs_gradients
def test_an_eval_teacher_and_a_student_in_train_mode_in_one_function():
    x = {"input_ids": tiny_llama.prompt()}
    teacher, student, eager = tiny_llama.model(), tiny_llama.model().train(), tiny_llama.model().train()

    def loss(teacher, student):
        with torch.no_grad():
            target = teacher(**x).logits
        return (student(**x).logits - target).square().mean() + student(**x).logits.mean()

    f = torch.compile(loss, backend="zipvl", options=OPTIONS)
    weight, same = student.lm_head.weight, eager.lm_head.weight
    (got,), (expected,) = (
        torch.autograd.grad(f(teacher, student), weight),
        torch.autograd.grad(loss(teacher, eager), same),
    )
    torch.testing.assert_close(got, expected)


@needs_gradients
def test_a_trainable_weight_of_the_last_layer_alone_counts_in_the_first():
    student, eager = tiny_llama.model().requires_grad_(False).train(), tiny_llama.model().train()
    weight = student.model.layers[-1].self_attn.k_proj.weight.requires_grad_()
    same = eager.model.layers[-1].self_attn.k_proj.weight
    assert_same_gradients(compiled(student), eager, {"input_ids": tiny_llama.prompt()}, weight, of=[same])


@needs_gradients
def test_one_trainable_part_in_train_mode_of_a_model_in_eval_mode_counts():
    student, eager = tiny_llama.model(), tiny_llama.model()
    student.model.layers[-1].mlp.train()
    weight, same = (m.model.layers[-1].mlp.up_proj.weight for m in (student, eager))
    assert_same_gradients(compiled(student), eager, {"input_ids": tiny_llama.prompt()}, weight, of=[same])


def test_a_frozen_model_in_train_mode_is_inference():
    frozen = tiny_llama.model().requires_grad_(False).train()
    assert is_sparse(compiled(frozen)(input_ids=tiny_llama.prompt(), use_cache=True))


@needs_gradients
def test_train_then_eval_then_train_with_one_function():
    model = tiny_llama.model()
    f, x = compiled(model), {"input_ids": tiny_llama.prompt()}
    for training in (True, False, True, False):
        model.train(training)
        if training:
            assert_same_gradients(f, model, x, model.lm_head.weight)
        else:
            assert is_sparse(f(**x, use_cache=True))


@needs_gradients
def test_freezing_and_thawing_with_one_function():
    model = tiny_llama.model().train().requires_grad_(False)
    f, x = compiled(model), {"input_ids": tiny_llama.prompt()}
    assert is_sparse(f(**x, use_cache=True))
    model.model.layers[-1].mlp.up_proj.weight.requires_grad_()
    assert_same_gradients(f, model, x, model.model.layers[-1].mlp.up_proj.weight)
    model.requires_grad_(False)
    assert is_sparse(f(**x, use_cache=True))


@needs_gradients
def test_what_a_differentiated_graph_hands_on_behind_a_graph_break_counts():
    model = tiny_llava.model()

    def ask(x):
        image = model.get_image_features(pixel_values=x["pixel_values"]).pooler_output
        torch._dynamo.graph_break()
        words = model.get_input_embeddings()(x["input_ids"][:, 65:])
        return model(inputs_embeds=torch.cat([image[0][None], words], 1), use_cache=True)

    x = tiny_llava.inputs(text=20)
    f = torch.compile(ask, backend="zipvl", options=OPTIONS)
    assert is_sparse(f(x))
    x["pixel_values"].requires_grad_()
    (got,) = torch.autograd.grad(f(x).logits.square().mean(), x["pixel_values"])
    (expected,) = torch.autograd.grad(ask(x).logits.square().mean(), x["pixel_values"])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


SHIFT = torch.zeros(64)


def test_what_enters_unseen_behind_the_first_cache_layer_is_an_error_with_a_remedy():
    model = tiny_llama.model()
    model.model.layers[1].register_forward_pre_hook(lambda module, given: (given[0] + SHIFT, *given[1:]))
    SHIFT.requires_grad_()
    try:
        with pytest.raises(ValueError, match=r"enters it behind the first KV cache layer\. Pass it as an argument"):
            compiled(model)(input_ids=tiny_llama.prompt(), use_cache=True)
        with torch.no_grad():
            assert is_sparse(compiled(model)(input_ids=tiny_llama.prompt(), use_cache=True))
    finally:
        SHIFT.requires_grad_(False)


def test_it_warns_once_and_says_what_to_do():
    x = {"inputs_embeds": tiny_llama.model().get_input_embeddings()(tiny_llama.prompt()).detach().requires_grad_()}
    f = compiled(tiny_llama.model())
    with pytest.warns(UserWarning, match=r"an input or a parameter in training mode requires them: run under"):
        f(**x, use_cache=True)
    with warnings.catch_warnings(record=True) as caught, collect() as reports:
        f(inputs_embeds=torch.cat([x["inputs_embeds"]] * 2, 1), use_cache=True)
    assert not [one for one in caught if "zipvl" in str(one.message)]
    assert [site.reason for report in reports for site in report.sites] == [compile_report.GRADIENTS] * 2


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off_nothing_needs_them(off):
    model = tiny_llama.model().train()
    embeds = torch.randn(1, 40, 64, requires_grad=True)
    with off():
        assert is_sparse(compiled(model)(inputs_embeds=embeds, use_cache=True))
