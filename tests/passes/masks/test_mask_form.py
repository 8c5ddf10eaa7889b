"""Masks are recognised by what they compute, in whichever way they are written; look-alikes are not."""

import pytest
import torch
from support.graph_modules import Wrapped, trace
from support.mask_cases import CASES, PADDING, SPANS, N, hugging_face, rows, triangle
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers import masking_utils

from zipvl_compile.passes.masks import mask_form as masks


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES)
def test_masks_that_need_no_matrix(case, dynamic):
    make, parts = CASES[case]
    form = read(make, dynamic)
    assert tuple(map(str, form.parts)) == parts and not form.needs_matrix
    assert (form.padding is not None) == ("padding" in parts)
    if form.padding is not None:
        assert form.padding.op == "placeholder", "the padding row is the model's own mask"


def read(make, dynamic=False):
    graph = trace(make, PADDING, torch.zeros(2, N, 3), dynamic=dynamic)
    return masks.read(graph.output_node().args[0][0])


def with_padding(function):
    return hugging_face(function), hugging_face(function, vmap=True)


OTHERS = {
    "sliding": (
        hugging_face(masking_utils.sliding_window_causal_mask_function(4)),
        "causal + padding + sliding window of 4",
    ),
    "sliding-vmap": (
        hugging_face(masking_utils.sliding_window_causal_mask_function(4), vmap=True),
        "causal + padding + sliding window of 4",
    ),
    "chunked": (
        hugging_face(masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))),
        "causal + chunks of 4 + padding",
    ),
    "image-spans": (
        hugging_face(
            masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(SPANS))
        ),
        "image spans + padding",
    ),
    "prefix": (lambda p, x: triangle(x) | (rows(x)[None] < 4), "prefix"),
    "packed": (lambda p, x: triangle(x) & (p[:, None, :, None] == p[:, None, None, :]), "causal + packed sequences"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_masks_that_are_named_but_keep_their_matrix(case):
    make, name = OTHERS[case]
    form = read(make)
    assert form.needs_matrix and str(form) == name


LOOK_ALIKES = {
    "one-later-key": lambda p, x: triangle(x, 1),
    "not-itself": lambda p, x: triangle(x, -1),
    "anticausal": lambda p, x: triangle(x).transpose(0, 1),
    "reversed-rows": lambda p, x: rows(x)[None] <= (x.shape[1] - 1 - rows(x))[:, None],
    "padding-of-queries": lambda p, x: triangle(x)[None, None] & p[:, None, :, None].bool(),
    "inverted-padding": lambda p, x: triangle(x)[None, None] & ~p[:, None, None, :].bool(),
    "padding-is-two": lambda p, x: triangle(x)[None, None] & (p[:, None, None, :] == 2),
    "shifted-padding": lambda p, x: triangle(x[:, 1:])[None, None] & p[:, None, None, 1:].bool(),
    "two-paddings": lambda p, x: triangle(x) & p[:, None, None].bool() & (p + 1)[:, None, None].bool(),
    "alibi": lambda p, x: -(rows(x)[:, None] - rows(x)[None]).abs().float() * 0.5,
    "soft": lambda p, x: torch.full((x.shape[1],) * 2, -5.0).triu(1),
    "every-other-key": lambda p, x: rows(x)[::2][None] <= rows(x)[:, None],
    "changed-in-place": lambda p, x: triangle(x).clone().logical_not_(),
    "set-row": lambda p, x: _with_row_set(triangle(x)),
    "random": lambda p, x: torch.rand(x.shape[1], x.shape[1]) < 0.5,
}


def _with_row_set(mask):
    mask = mask.clone()
    mask[0] = True
    return mask


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alikes_keep_their_matrix(case, dynamic):
    form = read(LOOK_ALIKES[case], dynamic)
    assert form.needs_matrix, f"{case} was read as {form}"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", [case for case, (_, parts) in CASES.items() if "causal" in parts])
def test_no_matrix_is_left_in_the_graph_and_the_numbers_are_the_same(record, modules, by_the_paper, case, dynamic):
    make, parts = CASES[case]

    def attend(q, k, v, padding):
        mask = make(padding, q[:, 0])
        return modules.attend(q, k, v, attn_mask=mask.to(q.dtype) if mask.is_floating_point() else mask), modules.cache(
            k, v
        )

    q, k, v = modules.qkv(n=N)
    module = modules.Packed(Wrapped(attend), q, k, v)
    probes = {"recent_probes": 3, "random_probes": 2}
    (out, (_, _, kept)), recorder = record(module, modules.pack(q, k, v), PADDING, dynamic=dynamic, **probes)
    (site,) = [site.outcome for site in recorder.sites[0].prefill]
    assert site.rewritten and site.mask == " + ".join(parts)
    if "vmap" not in case:  # the calls of a vmap come in pairs and are left to the inner compiler
        assert not [node for node in recorder.graphs[0].nodes if is_matrix(node)]
    visible = triangle(q[:, 0])[None, None]
    if "padding" in parts:
        visible = visible & PADDING[:, None, None].bool()
    visible = visible.expand(2, 1, N, N)
    exact, positions = by_the_paper(q, k, v, mask=visible, is_causal=False, **probes)
    assert kept.tolist() == positions.tolist() and positions.shape[2] < N
    torch.testing.assert_close(out, torch.from_numpy(exact), rtol=1e-6, atol=1e-7)


def is_matrix(node):
    value = node.meta.get("example_value")
    square = isinstance(value, torch.Tensor) and value.dim() >= 2
    return square and all(statically_known_true(size == value.shape[-1]) for size in value.shape[-2:])
