"""Layers that tokens pass if they are not kept: the numbers of the model written out, and nothing else is skipped.

The model written out computes every layer for every token, with keys hidden that are not kept, and then gives the
tokens that are not kept what came into the layer.
"""

import pytest
import torch
import torch.nn.functional as F
from support.experts import WEIGHTS, mixture
from support.hidden_states import PROBES, RATIO, WIDTH, N, P, RMSNorm, Stack, hidden_states, widths, without_spare

from zipvl_compile.passes.skip_layers import ATTENTION_ALONE

NORM, SCALE = RMSNorm().double(), torch.tensor(0.7, dtype=torch.float64)
ROUTER = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
EXPERTS = torch.randn(3, WIDTH, WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64) / 4


def written_out(stack, x, kept, mask=None, passed=lambda x: x):
    """Return the output of a stack `[B, n, width]`, with the kept positions `[B, 1, P]` of each layer given."""
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    for one, positions in zip(stack.layers, kept, strict=True):
        is_kept = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, positions[:, 0], True)
        out, _ = one(x, (causal if mask is None else mask) & is_kept[:, None, None])
        x = torch.where(is_kept[..., None], out, passed(x))
    return stack.read(stack.norm(x))


def skipping(record, stack, x, mask=None, passed=lambda x: x, **options):
    """Return what the recorder saw of a stack whose layers are skipped, after a check of its output."""
    given = () if mask is None else (mask,)
    outputs, recorder = record(stack, x, *given, prune=True, skip="layer", **options)
    out, *caches = outputs
    kept = [positions for *_, positions in caches]
    torch.testing.assert_close(out, written_out(stack, x, kept, mask, passed), rtol=1e-11, atol=1e-11)
    return recorder


def parallel(x, a, mlp):
    return x + a + mlp(x)


def experts(x, a, mlp):
    x = x + a
    weights = F.linear(x, ROUTER.T).softmax(-1)
    each = torch.stack([F.linear(x, expert) for expert in EXPERTS], -1)
    return x + (each * weights[:, :, None]).sum(-1)


def routed(x, a, mlp):
    """Two of four experts for each token, the tokens sorted by expert."""
    return x + a + mixture((x + a).view(-1, WIDTH), *WEIGHTS).view(x.shape[0], x.shape[1], WIDTH)


def shared(rows):
    """An expert of every token, with a gate for each."""
    return F.linear(F.silu(rows), EXPERTS[0]) * F.linear(rows, ROUTER.T[:1]).sigmoid()


def flattened(function):
    """Apply a function to the tokens of all samples in a row."""
    return lambda x: function(x.reshape(-1, WIDTH)).view(x.shape)


LAYERS = {
    "sequential": {},
    "fused, bias": {"fused": True, "bias": True},
    "the other way": {"joined": lambda x, a, mlp: mlp(a + x) + (a + x)},
    "parallel": {"joined": parallel},
    "parallel, branches first": {"joined": lambda x, a, mlp: (a + mlp(x)) + x},
    "parallel, MLP first": {"joined": lambda x, a, mlp: x + mlp(x) + a},
    "parallel, one norm": {"joined": lambda x, a, mlp: x + NORM(a + mlp(x))},
    "post norms": {"projected": NORM, "joined": lambda x, a, mlp: (x + a) + NORM(mlp(x + a))},
    "scaled branches": {"joined": lambda x, a, mlp: (x + a * 0.22) + mlp(x + a * 0.22) * 0.22},
    "gated branches": {"joined": lambda x, a, mlp: (x + a * torch.tanh(SCALE)) + torch.sigmoid(x) * mlp(x + a)},
    "several experts": {"joined": experts},
    "bias rows": {"bias": True, "projected": lambda x: torch.cos(x) + 2.0},
    "routed experts": {"joined": routed},
    "routed and shared experts": {"joined": lambda x, a, mlp: routed(x, a, mlp) + flattened(shared)(x + a)},
    "projections of all samples at once": {"projected": lambda x: flattened(NORM)(x), "bias": True},
}


def halved(x, a, mlp):
    x = (x + a) / 2
    return x + mlp(x)


@pytest.mark.parametrize("passed", [(0,), (1,), (), (0, 1), (7,), 0.5, 0.4, 0.6])
def test_only_layers_of_some_numbers_are_passed(record, passed):
    stack, x = Stack(), hidden_states(batch=2)
    options = {"skip": "layer", "skip_in": passed, "unselected": "all", "kept_window": True, "window": 3, "sinks": 1}
    (out, *caches), recorder = record(stack, x, prune=True, **options, **RATIO)
    passed = {0.5: (1,), 0.4: (1,), 0.6: ()}.get(passed, passed)
    n = x.shape[1]
    causal, y = torch.ones(n, n, dtype=torch.bool).tril(), x
    near = causal & (~torch.ones(n, n, dtype=torch.bool).tril(-3) | (torch.arange(n) < 1))
    for number, (one, (*_, positions)) in enumerate(zip(stack.layers, caches, strict=True)):
        is_kept = torch.zeros(y.shape[:2], dtype=torch.bool).scatter(1, positions[:, 0], True)
        seen = causal & is_kept[:, None, None]
        passing = number in passed
        out_rows, _ = one(y, seen if passing else seen | near)
        y = torch.where(is_kept[..., None] | (not passing), out_rows, y)
    torch.testing.assert_close(out, stack.read(stack.norm(y)), rtol=1e-11, atol=1e-11)
    assert [pruning.skipped for pruning in recorder.pruned] == ["" if i in passed else None for i in range(2)]


SCALED = {
    "of the layer": ({"joined": lambda x, a, mlp: ((x + a) + mlp(x + a)) * SCALE}, lambda x: x * SCALE),
    "of the input": ({"joined": lambda x, a, mlp: (x * 0.9 + a) + mlp(x)}, lambda x: x * 0.9),
    "between": ({"joined": halved}, lambda x: x / 2),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", LAYERS)
def test_tokens_that_are_not_kept_pass_every_form_of_a_layer(record, form, batch):
    recorder = skipping(record, Stack(**LAYERS[form]), hidden_states(batch=batch), **RATIO)
    assert [pruning.skipped for pruning in recorder.pruned] == ["", ""]
    found = widths(recorder.graphs[0])
    assert found["o"] == [P, P] and set(found.get("up", [P])) == {P}


@pytest.mark.parametrize("dynamic", [(), (1,), (0, 1)], ids=["static", "any length", "any batch"])
@pytest.mark.parametrize("inner", [None, "aot_eager"])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_routed_for_a_number_that_depends_on_data(record, inner, dynamic, batch):
    options, x = {"inner": inner, "tau": 0.6}, hidden_states(batch=batch)
    for axis in dynamic[batch == 1 :] if len(dynamic) > 1 else dynamic:
        torch._dynamo.mark_dynamic(x, axis)
    recorder = skipping(record, Stack(joined=routed), x, **options)
    assert [pruning.skipped for pruning in recorder.pruned] == ["", ""]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", SCALED)
def test_what_passes_a_layer_is_scaled_as_in_the_model(record, form, batch):
    layer, passed = SCALED[form]
    recorder = skipping(record, Stack(**layer), hidden_states(batch=batch), passed=passed, **RATIO)
    assert [pruning.skipped for pruning in recorder.pruned] == ["", ""]


def test_everything_but_keys_and_scores_is_computed_for_kept_tokens(record):
    found = widths(skipping(record, Stack(), hidden_states(), **RATIO).graphs[0])
    assert found == {"q": [PROBES, P] * 2, "k": [N] * 2, "v": [P] * 2, "o": [P] * 2, "up": [P] * 2}


@pytest.mark.parametrize("inner", [None, "aot_eager"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("every", "selecting"), [(2, [0, 2]), (3, [0, 3]), (0, [0])])
def test_layers_that_take_the_selection_of_another_need_no_other_keys(record, every, selecting, batch, inner):
    options = {"score_every": every, "inner": inner} | (RATIO if inner is None else {"tau": 0.6})
    recorder = skipping(record, Stack(layers=5), hidden_states(batch=batch), **options)
    selects = [number in selecting for number in range(5)] if every != 2 else [True, False, True, False, True]
    assert [pruning.keys for pruning in recorder.pruned] == [None if own else "" for own in selects]
    assert [pruning.skipped for pruning in recorder.pruned] == [""] * 5
    if inner is None:
        count = sum(selects)
        assert recorder.added[0]["zipvl.token_scores"] == recorder.added[0]["zipvl.select_tokens"] == count
        assert [width == N for width in widths(recorder.graphs[0])["k"]] == selects
        puts = [node for node in recorder.graphs[0].nodes if node.target in (torch.index_copy, torch.scatter)]
        assert len(puts) == count, "layers of one selection put their tokens back once, after the last of them"


@pytest.mark.parametrize("form", ["sequential", "parallel", "several experts", "routed experts"])
def test_what_a_token_saves_that_passes(record, form):
    """The output projection, and the MLP: of one linear, or of a router and three experts, or two of four."""
    _, recorder = record(Stack(**LAYERS[form]), hidden_states(), prune=True, skip="layer", **RATIO)
    (first, second) = recorder.sites[0].prefill
    mlp = {"several experts": 3 * WIDTH + 3 * WIDTH * WIDTH, "routed experts": 4 * WIDTH + 2 * 3 * WIDTH * WIDTH}
    mlp = mlp.get(form, WIDTH * WIDTH)
    assert first.shape.work == second.shape.work == WIDTH * WIDTH + mlp
    torch._dynamo.reset()
    _, recorder = record(Stack(**LAYERS[form]), hidden_states(), prune=True, **RATIO)
    assert recorder.sites[0].prefill[0].shape.work == 0, "none passes"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("inner", [None, "aot_eager"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_number_of_tokens_that_depends_on_data(record, batch, inner, dynamic):
    options = {"dynamic": dynamic, "inner": inner, "tau": 0.6}
    recorder = skipping(record, Stack(bias=True), hidden_states(batch=batch), **options)
    assert [pruning.skipped for pruning in recorder.pruned] == ["", ""]


def test_padding(record):
    mask = torch.ones(N, N, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[0, :, :, :5] = False
    mask |= torch.eye(N, dtype=torch.bool)  # a row without any key has no output to compare
    recorder = skipping(record, Stack(), hidden_states(batch=2), mask, **RATIO)
    assert [pruning.skipped for pruning in recorder.pruned] == ["", ""]


def test_the_last_layer_computes_the_newest_row_alone(record):
    stack, x = Stack(read=lambda x: x[:, -1:]), hidden_states()
    recorder = skipping(record, stack, x, **RATIO)
    assert [pruning.skipped for pruning in recorder.pruned] == ["", "only some of its rows are needed"]
    assert widths(recorder.graphs[0])["up"] == [P, 1]


def test_a_layer_after_one_that_every_token_goes_through(record):
    """What comes into it is a sum, too, as far back as the embedding."""
    stack = Stack(layers=3)
    outputs, recorder = record(stack, hidden_states(), prune=True, skip="layer", dense_layers=(0, 1), **RATIO)
    assert [pruning.skipped for pruning in recorder.pruned] == [""]
    x = hidden_states()
    for one in stack.layers[:2]:
        x, _ = one(x)
    is_kept = torch.zeros(1, N, dtype=torch.bool).scatter(1, outputs[-1][2][:, 0], True)
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    last, _ = stack.layers[2](x, causal & is_kept[:, None, None])
    torch.testing.assert_close(outputs[0], stack.norm(torch.where(is_kept[..., None], last, x)))


SHIFT = torch.randn(WIDTH, 1, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def convolved(x):
    return F.conv1d(x.transpose(1, 2), SHIFT, padding=1, groups=WIDTH).transpose(1, 2)


def after_the_attention(mix):
    def joined(x, a, mlp):
        x = x + a
        return x + mlp(mix(x))

    return joined


NEAR_MISSES = {
    "a convolution over tokens": (after_the_attention(convolved), "may mix tokens"),
    "a norm along the tokens": (after_the_attention(lambda x: x.softmax(1)), "works along the tokens"),
    "a token shift": (after_the_attention(lambda x: x.roll(1, 1)), "'roll' may mix tokens"),
    "no residual": (lambda x, a, mlp: torch.ones_like(x) + a, "is not added to a tensor that it is computed from"),
    "a product instead of a sum": (lambda x, a, mlp: x * (a + mlp(a)), "the attention is dense"),
    "a sum in place": (lambda x, a, mlp: (x * 1).add_(a) + mlp(x), "is changed in place"),
    "no MLP": (lambda x, a, mlp: x + a, ATTENTION_ALONE),
}


@pytest.mark.parametrize("form", NEAR_MISSES)
def test_what_is_no_such_layer_is_computed_for_every_token_and_says_why(record, form):
    joined, reason = NEAR_MISSES[form]
    stack, x = Stack(layers=1, joined=joined), hidden_states()
    plain, _ = record(stack, x, prune=True, **RATIO)
    torch._dynamo.reset()
    outputs, recorder = record(stack, x, prune=True, skip="layer", **RATIO)
    (pruning,) = recorder.pruned
    assert reason in pruning.skipped and f"; layer for every token: {pruning.skipped}" in str(pruning)
    for got, expected in zip(without_spare(outputs, N), without_spare(plain, N), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_what_is_added_besides_reaches_every_token(record):
    """As in Qwen3-VL, whose first layers get features of the vision tower."""
    pictures = torch.randn(1, N, WIDTH, generator=torch.Generator().manual_seed(8), dtype=torch.float64)

    def with_pictures(x, a, mlp):
        return (x + a) + mlp(x + a) + pictures

    stack = Stack(joined=with_pictures)
    recorder = skipping(record, stack, hidden_states(), passed=lambda x: x + pictures, **RATIO)
    assert [pruning.skipped for pruning in recorder.pruned] == ["", ""]


def test_a_part_that_is_computed_for_all_layers_at_once_reaches_every_token(record):
    """As the inputs per layer of Gemma 4: a gate on each token's own part, after the MLP."""
    parts = torch.randn(1, N, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def with_parts(x, a, mlp):
        x = x + a
        x = x + mlp(x)
        return x + NORM(torch.tanh(x) * parts)

    recorder = skipping(
        record, Stack(joined=with_parts), hidden_states(), passed=lambda x: x + NORM(torch.tanh(x) * parts), **RATIO
    )
    assert [pruning.skipped for pruning in recorder.pruned] == ["", ""]
