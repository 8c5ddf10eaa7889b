"""window_attention against its definition, written out in float64 NumPy, one query at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import compare_kernels
from support.cases import assert_as_accurate, choose, padding
from support.compare_kernels import exactly
from support.implementations import gpu_only, in_every_dtype, only, triton_only

from zipvl_compile.kernels.common.dispatch import interpreted
from zipvl_compile.kernels.gather_tokens import gather_tokens
from zipvl_compile.kernels.sparse_attention import sparse_attention
from zipvl_compile.kernels.window_attention import window_attention

MASKS = ("none", "left-row", "right-row", "left", "right", "bool", "inf", "min", "bias", "bias-row")
#: Kept rows see kept tokens, their window, too; every row does.
KEPT, UNION, EVERY = {}, {"kept_window": True}, {"kept_window": True, "queries": "all"}
each_rule = pytest.mark.parametrize("rule", [KEPT, UNION, EVERY], ids=["kept", "kept-window", "every-row"])


def definition(
    q, k, v, positions, visible, mask=None, *, is_causal=True, scale=None, softcap=None, window=64, sinks=4,
    kept_window=False, queries="selected",
):  # fmt: skip
    """Return `[B, Hq, n, Dv]`, and which rows see anything, from sets of keys."""
    batch, heads, n, width = q.shape
    q, k, v = (x.double().numpy() for x in (q, k, v))
    added = np.zeros((batch, heads, n, n))
    if mask is not None:
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        bias = torch.where(shown, 0.0 if mask.dtype == torch.bool else mask.double(), -torch.inf)
        added = added + bias.expand(batch, heads, n, n).numpy()
    out, answered = np.zeros((batch, heads, n, v.shape[3])), np.zeros((batch, heads, n, 1), dtype=bool)
    for b in range(batch):
        first = [j for j in range(n) if visible[b, j] > 0][:sinks]
        for h in range(heads):
            kept = set(positions[b, h * positions.shape[1] // heads].tolist())
            kv = h * k.shape[1] // heads
            for i in range(n):
                local = set(range(max(i - window + 1, 0), i + 1)) | {j for j in first if j <= i}
                sparse = {j for j in kept if j <= i or not is_causal}
                attends = i in kept or queries == "all"
                keys = local if not attends else sparse | local if kept_window else sparse
                keys = np.array(sorted(j for j in keys if added[b, h, i, j] > -np.inf), dtype=int)
                if len(keys) == 0:
                    continue
                scores = k[b, kv, keys] @ q[b, h, i] * (width**-0.5 if scale is None else scale)
                scores = (scores if softcap is None else softcap * np.tanh(scores / softcap)) + added[b, h, i, keys]
                weights = np.exp(scores - scores.max())
                out[b, h, i], answered[b, h, i] = weights @ v[b, kv, keys] / weights.sum(), True
    return torch.from_numpy(out), torch.from_numpy(answered)


def masked(name, batch, heads, n, dtype, seed=0):
    """Return the mask of that name, and which tokens of each sample are real."""
    generator = torch.Generator().manual_seed(seed)
    real, causal = torch.ones(batch, n, dtype=torch.bool), torch.ones(n, n).tril().bool()
    side = name.split("-")[0]
    if side in ("left", "right"):
        real = padding(batch, n, side)
        return real[:, None, None] if name.endswith("row") else causal & real[:, None, None], real
    if name == "none":
        return None, real
    if name == "bias-row":
        return torch.randn(1, heads, 1, n, generator=generator, dtype=torch.float64).to(dtype), real
    shown = torch.rand(batch, heads, n, n, generator=generator) < 0.6  # some rows see nothing
    if name == "bool":
        return shown, real
    if name == "bias":
        shown = (shown | True)[:1]
    lowest = -torch.inf if name == "inf" else torch.finfo(dtype).min
    bias = torch.randn(shown.shape, generator=generator, dtype=torch.float64).to(dtype)
    return bias.masked_fill(~shown, lowest), real


def kept_kv(k, v, positions, spare=3):
    """Return the kept tokens as a cache holds them: rows that nobody wrote after them."""
    kept = [gather_tokens(x, positions, spare) for x in (k, v)]
    for x in kept:
        x[:, :, positions.shape[2] :] = float("nan")
    return kept


def check(implementation, q, k, v, positions, visible, mask=None, **options):
    """Compare with the definition; the error with that of PyTorch in the same dtype, if that is not what runs."""
    given_ = (q, k, v, *kept_kv(k, v, positions), positions, visible, mask)
    got = implementation.run(window_attention, *given_, **options)
    exact, answered = definition(q, k, v, positions, visible, mask, **options)
    assert got.dtype == q.dtype and got.transpose(1, 2).is_contiguous()
    assert not got.masked_select(~answered).any(), "a row that sees nothing gets zeros"
    if q.dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    else:
        assert_as_accurate(got, plain(q, k, v, positions, visible, mask, **options), exact)
    return got


def plain(
    q, k, v, positions, visible, mask=None, *, is_causal=True, scale=None, softcap=None, window=64, sinks=4,
    kept_window=False, queries="selected",
):  # fmt: skip
    """Return dense attention in the dtype of `q` with all other keys hidden."""
    batch, heads, n, width = q.shape
    i, j = torch.arange(n)[:, None], torch.arange(n)
    kept = torch.zeros(batch, positions.shape[1], n, dtype=torch.bool).scatter_(2, positions, True)
    kept = kept.repeat_interleave(heads // positions.shape[1], 1)
    first = (visible > 0) & ((visible > 0).cumsum(1) <= sinks)
    local = ((j > i - window) | first[:, None, None]) & (j <= i)
    sparse = kept[:, :, None] & ((j <= i) | torch.tensor(not is_causal))
    attends = kept | torch.tensor(queries == "all")
    shown = torch.where(attends[..., None], sparse | (local & torch.tensor(kept_window)), local)
    scores = q @ k.repeat_interleave(heads // k.shape[1], 1).mT * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        shown = shown & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min)
        scores = scores if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores.masked_fill(~shown, -torch.inf), -1).nan_to_num(0.0)
    return weights @ v.repeat_interleave(heads // v.shape[1], 1)


@st.composite
def problems(draw, most=200):
    """Draw the arguments of `check` but for the dtype and the tensors: sizes, and options of the operator."""
    n, heads = draw(st.integers(1, most)), draw(st.sampled_from([(2, 2), (4, 2), (6, 2), (3, 1)]))
    sizes = {"batch": draw(st.integers(1, 2)), "heads": heads, "n": n, "dim": draw(st.integers(1, 20)),
             "value_dim": draw(st.one_of(st.none(), st.integers(1, 20))), "seed": draw(st.integers(0, 99))}  # fmt: skip
    options = {"is_causal": draw(st.booleans()), "window": draw(st.integers(1, 80)), "sinks": draw(st.integers(0, 8)),
               "softcap": draw(st.sampled_from([None, None, 2.0])), "scale": draw(st.sampled_from([None, 0.3])),
               **draw(st.sampled_from([KEPT, UNION, EVERY]))}  # fmt: skip
    chosen = {"p": draw(st.integers(1, n)), "groups": draw(st.sampled_from([1, heads[1]]))}
    return sizes, chosen, draw(st.sampled_from(MASKS)), options


def check_problem(implementation, cases, problem, dtype):
    sizes, chosen, kind, options = problem
    q, k, v = cases.qkv(**sizes, dtype=dtype)
    batch, heads, n, _ = q.shape
    mask, real = masked(kind, batch, heads, n, dtype, sizes["seed"])
    positions = choose(batch, chosen["groups"], n, chosen["p"], sizes["seed"])
    return check(implementation, q, k, v, positions, real.to(torch.float32), mask, **options)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(problem=problems())
@only("torch")
def test_any_problem(implementation, cases, problem):
    check_problem(implementation, cases, problem, torch.float64)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(problem=problems(most=70), dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
@triton_only
def test_any_problem_in_triton(implementation, cases, problem, dtype):
    check_problem(implementation, cases, problem, dtype)


@each_rule
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "not"])
def test_every_mask(implementation, cases, kind, is_causal, rule):
    q, k, v = cases.qkv(batch=2, n=41, dim=8, value_dim=6, dtype=implementation.finest)
    mask, real = masked(kind, 2, 8, 41, implementation.finest)
    options = {"is_causal": is_causal, "window": 5, "sinks": 3, **rule}
    check(implementation, q, k, v, choose(2, 2, 41, 15), real, mask, **options)


@each_rule
@pytest.mark.parametrize("kind", ["none", "left-row", "bias"])
@in_every_dtype
def test_every_dtype(implementation, dtype, cases, kind, rule):
    q, k, v = cases.qkv(batch=2, n=100, dim=20, dtype=dtype)
    mask, real = masked(kind, 2, 8, 100, dtype)
    check(implementation, q, k, v, choose(2, 1, 100, 40), real, mask, window=30, **rule)


@each_rule
@pytest.mark.parametrize("window", [1, 63, 64, 65, 150, 300, 1000])
@only("torch")
def test_every_size_of_a_block(implementation, cases, window, rule):
    q, k, v = cases.qkv(batch=2, n=301, heads="mqa", dim=4)  # samples have other kept tokens before a block
    seen = torch.ones(2, 301)
    check(implementation, q, k, v, choose(2, 1, 301, 100), seen, window=window, **rule)


@each_rule
@pytest.mark.parametrize("sinks", [0, 1, 16, 17, 40])
def test_any_number_of_sinks(implementation, cases, sinks, rule):
    q, k, v = cases.qkv(batch=2, n=37, heads="mqa", dim=4, dtype=implementation.finest)
    real = padding(2, 37, "left")
    options = {"window": 3, "sinks": sinks, **rule}
    check(implementation, q, k, v, choose(2, 1, 37, 9), real, real[:, None, None], **options)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("p", "share"), [(12, 0.5), (11, 0.5), (23, 1.0), (22, 1.0)])
def test_from_some_fraction_kept_every_row_sees_all(implementation, cases, p, share, is_causal):
    q, k, v = cases.qkv(batch=2, n=23, dim=8, dtype=implementation.finest)
    positions, visible = choose(2, 1, 23, p), torch.ones(2, 23)
    options = {"window": 2, "sinks": 1, "is_causal": is_causal, **EVERY}
    given_ = (q, k, v, *kept_kv(k, v, positions), positions, visible)
    got = implementation.run(window_attention, *given_, dense_from=share, **options)
    whole, usual = choose(2, 1, 23, 23), implementation.run(window_attention, *given_, **options)
    exact, _ = definition(q, k, v, whole if p >= share * 23 else positions, visible, **options)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    assert got.transpose(1, 2).is_contiguous()
    assert (got - usual).abs().max() > 1e-3 or (p >= share * 23) == (p == 23)


def test_masked_and_newest_rows_see_kept_tokens_whatever_their_number(implementation, cases):
    q, k, v = cases.qkv(batch=1, n=23, dim=8, dtype=implementation.finest)
    positions, visible = choose(1, 1, 23, 20), torch.ones(1, 23)
    mask = torch.ones(1, 1, 1, 23, dtype=torch.bool)
    for queries, hiding in ((q, mask), (q[:, :, -5:], None)):
        given_ = (queries, k, v, *kept_kv(k, v, positions), positions, visible, hiding)
        options = {"window": 2, "sinks": 1, **EVERY}
        found = [implementation.run(window_attention, *given_, dense_from=share, **options) for share in (0.5, 1.0)]
        assert torch.equal(*found)


@each_rule
@pytest.mark.parametrize("window", [1, 4, 100])
def test_from_no_kept_token_to_all(implementation, cases, window, rule):
    q, k, v = cases.qkv(batch=2, n=23, dim=8, dtype=implementation.finest)
    for p in (0, 1, 22, 23):
        options = {"window": window, **rule}
        check(implementation, q, k, v, choose(2, 1, 23, p), torch.ones(2, 23), **options)


@pytest.mark.parametrize("kind", ["none", "left-row", "bool"])
def test_kept_rows_are_those_of_sparse_attention(implementation, cases, kind):
    q, k, v = cases.qkv(batch=2, n=50, dim=8, dtype=implementation.finest)
    mask, real = masked(kind, 2, 8, 50, implementation.finest)
    positions, index = choose(2, 1, 50, 20), choose(2, 1, 50, 20)[..., None].expand(-1, 8, -1, 8)
    kept = kept_kv(k, v, positions)
    got = implementation.run(window_attention, q, k, v, *kept, positions, real, mask)
    sparse = implementation.run(sparse_attention, q, *kept, positions, mask)
    torch.testing.assert_close(got.gather(2, index), sparse.gather(2, index), rtol=0, atol=0)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "not"])
@pytest.mark.parametrize("kind", ["none", "left-row", "bias"])
@pytest.mark.parametrize("rows", [1, 2, 70, 140])
def test_the_newest_rows_alone(implementation, cases, rows, kind, is_causal):
    q, k, v = cases.qkv(batch=2, n=150, dim=8, value_dim=6, dtype=implementation.finest)
    mask, real = masked(kind, 2, 8, 150, implementation.finest)
    positions = choose(2, 2, 150, 50)
    given_ = (k, v, *kept_kv(k, v, positions), positions, real.to(torch.float32), mask)
    options = {"is_causal": is_causal, "window": 20, **EVERY}
    whole = implementation.run(window_attention, q, *given_, **options)
    part = implementation.run(window_attention, q[:, :, -rows:], *given_, **options)
    tolerance = 1e-12 if implementation.finest == torch.float64 else 1e-5
    torch.testing.assert_close(part, whole[:, :, -rows:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked_", [False, True], ids=["none", "mask"])
def test_a_window_over_all_tokens_is_dense_attention(implementation, cases, masked_):
    """Also where rows see kept tokens and their window: no key counts twice."""
    q, k, v = cases.qkv(batch=2, n=90, dim=8, dtype=implementation.finest)
    mask = masked("bias", 2, 8, 90, implementation.finest)[0] if masked_ else None
    positions = choose(2, 2, 90, 30)
    given_ = (q, k, v, *kept_kv(k, v, positions), positions, torch.ones(2, 90), mask)
    got, every = (implementation.run(window_attention, *given_, window=90, **rule) for rule in (UNION, EVERY))
    exact = cases.plain_attention(q.double(), k.double(), v.double(), exactly(mask))
    tolerance = 1e-12 if implementation.finest == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(every.double(), exact, rtol=tolerance, atol=tolerance)


@each_rule
@pytest.mark.parametrize("form", ["row", "causal", "additive"])
def test_left_padding_changes_no_answer(implementation, cases, form, rule):
    n, pad, dtype = 60, 17, implementation.finest
    q, k, v = cases.qkv(n=n, dim=8, dtype=dtype)
    positions, options = choose(1, 1, n, 20), {"window": 7, "sinks": 3, **rule}
    given_ = (q, k, v, *kept_kv(k, v, positions), positions, torch.ones(1, n))
    alone = implementation.run(window_attention, *given_, **options)
    long = [torch.cat((torch.full((1, x.shape[1], pad, 8), 7.0, dtype=dtype), x), 2) for x in (q, k, v)]
    q2, k2, v2 = (torch.cat((x, torch.randn(1, *x.shape[1:], dtype=dtype))) for x in long)
    moved = torch.cat((positions + pad, choose(1, 1, n + pad, 20)))
    real = torch.arange(n + pad) >= torch.tensor([[pad], [0]])
    mask = real[:, None, None]
    if form != "row":
        mask = mask & torch.ones(n + pad, n + pad).tril().bool()
    if form == "additive":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    given_ = (q2, k2, v2, *kept_kv(k2, v2, moved), moved, real.to(torch.float32), mask)
    batch = implementation.run(window_attention, *given_, is_causal=form == "row", **options)
    torch.testing.assert_close(batch[:1, :, pad:], alone)
    assert not batch[0, :, :pad].any(), "padding sees nothing"


@each_rule
def test_a_sample_of_padding_only_is_zero(implementation, cases, rule):
    q, k, v = cases.qkv(batch=2, n=21, dim=8, dtype=implementation.finest)
    real = torch.ones(2, 21, dtype=torch.bool)
    real[1] = False
    options = {"window": 4, **rule}
    got = check(implementation, q, k, v, choose(2, 1, 21, 9), real, real[:, None, None], **options)
    assert got[0].any() and not got[1].any()


@each_rule
def test_far_keys_are_not_read(implementation, cases, rule):
    """A NaN outside the slice of its block does not reach a row, unless it is kept and sees later ones."""
    q, k, v = cases.qkv(n=200, heads="mqa", dim=8, dtype=implementation.finest)
    positions = torch.tensor([[[0, 30, 199]]])
    given_ = (*kept_kv(k, v, positions), positions, torch.ones(1, 200))
    options = {"window": 5, "sinks": 2, **rule}
    clean = implementation.run(window_attention, q, k, v, *given_, **options)
    k[:, :, 150], v[:, :, 150] = float("nan"), float("nan")
    dirty = implementation.run(window_attention, q, k, v, *given_, **options)
    assert dirty[:, :, 150:155].isnan().all()
    for rows in (slice(1, 30), slice(31, 72)):  # the block before
        assert torch.equal(dirty[:, :, rows], clean[:, :, rows])


def test_inputs_stay_as_they_are(implementation, cases):
    q, k, v = cases.qkv(n=21, dim=8, dtype=implementation.finest)
    positions = choose(1, 1, 21, 9)
    given_ = implementation.given(
        q, k, v, *(gather_tokens(x, positions) for x in (k, v)), positions, torch.ones(1, 21),
        masked("bias", 1, 8, 21, implementation.finest)[0],
    )  # fmt: skip
    copies = [x.clone() for x in given_]
    for rule in (KEPT, UNION, EVERY):
        window_attention(*given_, **rule, kernel=implementation.kernel)
    assert all(torch.equal(x, copy) for x, copy in zip(given_, copies, strict=True))


def test_empty_batch(implementation):
    q, k, v = torch.ones(0, 4, 6, 8), torch.ones(0, 2, 6, 8), torch.ones(0, 2, 6, 5)
    given_ = (q, k, v, k[:, :, :3], v[:, :, :3], torch.zeros(0, 1, 3, dtype=torch.int64), torch.ones(0, 6))
    assert implementation.run(window_attention, *given_).shape == (0, 4, 6, 5)


@each_rule
def test_a_mask_of_no_samples_is_none(implementation, cases, rule):
    q, k, v = cases.qkv(n=19, dim=4, dtype=implementation.finest)
    positions = choose(1, 1, 19, 5)
    given_ = (q, k, v, *kept_kv(k, v, positions), positions, torch.ones(1, 19))
    nothing = torch.ones(0, 1, 1, 19, dtype=torch.bool)
    got, expected = (implementation.run(window_attention, *given_, mask, window=3, **rule) for mask in (nothing, None))
    assert torch.equal(got, expected)


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "left-row", "left"])
@only("interpreted")
def test_several_blocks_of_kept_rows(implementation, cases, kind, dtype, rule):
    q, k, v = cases.qkv(batch=2, heads="mha", n=170, dim=60, dtype=dtype)
    mask, real = masked(kind, 2, 2, 170, dtype)
    check(implementation, q, k, v, choose(2, 1, 170, 140), real, mask, window=40, **rule)


@each_rule
@pytest.mark.parametrize("kernel", ["triton", "auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@gpu_only
def test_a_large_prompt(implementation, cases, dtype, kernel, rule):
    q, k, v = cases.qkv(2, (16, 4), 4096, 64, dtype=dtype)
    row, positions = padding(2, 4096, "left"), choose(2, 1, 4096, 1600)
    given_ = (q, k, v, *(gather_tokens(x, positions) for x in (k, v)), positions, row.float(), row[:, None, None])
    where = row[:, None, :, None].expand(-1, 16, -1, 1)
    options = {"kernel": kernel, **rule, "where": where, "zeros": False}
    compare_kernels.check(implementation, window_attention, *given_, **options)


Q, K, V = torch.ones(2, 4, 6, 8), torch.ones(2, 2, 6, 8), torch.ones(2, 2, 6, 5)
GOOD = {"q": Q, "k": K, "v": V, "kept_k": K[:, :, :3], "kept_v": V[:, :, :3],
        "positions": torch.arange(3).repeat(2, 1, 1), "visible": torch.ones(2, 6)}  # fmt: skip
BAD = {
    "q-integer": ({"q": Q.int()}, "q: expected a floating-point dtype, got torch.int32"),
    "q-rows": ({"q": Q[:, :, :3]}, "q: expected 6 tokens, like k, got 3"),
    "q-too-many": ({"q": Q.repeat(1, 1, 2, 1), **EVERY}, "q: expected 6 tokens, like k, or the newest of them, got 12"),
    "queries": ({"queries": "none"}, 'queries: expected "selected" or "all", got \'none\''),
    "kept_window": ({"queries": "all"}, 'kept_window: expected True, with queries="all", got False'),
    "k-width": ({"k": K[..., :4]}, "k: expected head_dim 8, like q, got 4"),
    "v-heads": ({"v": V[:, :1]}, "v: expected heads and tokens [2, 6], like k, got [1, 6]"),
    "kept_k-rank": ({"kept_k": K[0]}, "kept_k: expected batch, heads, head_dim, dtype and device ['2', '2', '8', "),
    "kept_k-heads": ({"kept_k": K[:, :1]}, "like k, got [2, 1, 6, 8] torch.float32 cpu"),
    "kept_k-rows": ({"kept_k": K[:, :, :2]}, "kept_k: expected at least 3 kept tokens, got 2"),
    "kept_v-width": ({"kept_v": V[..., :4]}, "kept_v: expected batch, heads, head_dim, dtype and device"),
    "kept_v-dtype": ({"kept_v": V.half()}, "like v, got [2, 2, 6, 5] torch.float16 cpu"),
    "kept_v-rows": ({"kept_v": V[:, :, :2]}, "kept_v: expected at least 3 kept tokens, got 2"),
    "positions-rank": ({"positions": torch.arange(3)}, "positions: expected an int64 [batch, groups, kept] tensor"),
    "visible": ({"visible": torch.ones(2, 5)}, "visible: expected a [2, 6] tensor on cpu, got [2, 5] on cpu"),
    "mask": ({"mask": torch.ones(2, 1, 3, 3) > 0}, "mask: expected a shape that broadcasts to [2, 4, 6, 6]"),
    "window": ({"window": 0}, "window: expected at least 1 token, got 0"),
    "sinks": ({"sinks": -1}, "sinks: expected at least 0 tokens, got -1"),
    "dense_from": ({"dense_from": 0.0}, "dense_from: expected a fraction in (0, 1], got 0.0"),
    "kernel": ({"kernel": "cuda"}, 'kernel: expected "auto", "triton" or "torch", got \'cuda\''),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name):
    given_, message = BAD[name]
    with pytest.raises(ValueError, match=r"^zipvl::window_attention: ") as raised:
        window_attention(**(GOOD | given_))
    assert message in str(raised.value)
    assert str(raised.value).endswith(".")


@pytest.mark.skipif(not interpreted(), reason="runs where there is no GPU")
def test_float64_has_no_kernel():
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        doubles = {name: x.double() if x.dtype == torch.float32 else x for name, x in GOOD.items()}
        window_attention(**doubles, kernel="triton")
