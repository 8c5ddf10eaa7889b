"""Every operator: that it is registered, and torch.library.opcheck of its schema, fake and dynamic shapes."""

import inspect
from pathlib import Path

import pytest
import torch
from torch._inductor.ir import FallbackKernel
from torch.library import opcheck

from zipvl_compile.kernels.budget import Budget
from zipvl_compile.kernels.ops import OPERATORS, ops

TESTS = Path(__file__).parent
KERNELS = TESTS.parents[1] / "kernels"
SOURCES = sorted(path.relative_to(KERNELS) for path in KERNELS.rglob("*.py"))
REGISTRATIONS = ("torch.library.custom_op(", "torch.library.triton_op(", "torch.library.define(")
ALL = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v = draw(2, 4, 10, 8), draw(2, 2, 10, 8), draw(2, 2, 10, 6)
    positions = torch.tensor([[[0, 3, 9]], [[1, 2, 9]]])
    mask = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    return q, k, v, positions, mask


def registered():
    """Return the schema of every operator of this package."""
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name.removeprefix("zipvl::"): schema for schema in schemas if schema.name.startswith("zipvl::")}


def test_every_file_that_registers_an_operator_is_listed():
    registering = {path.stem for path in SOURCES if any(call in (KERNELS / path).read_text() for call in REGISTRATIONS)}
    assert registering == set(OPERATORS) and list(OPERATORS) == sorted(OPERATORS)
    assert all(name in registered() for name in OPERATORS if name != "probe_rows")


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_file_has_tests_of_its_name(source):
    tests = TESTS / source.parent / f"test_{source.name}"
    package = ".".join(["zipvl_compile.kernels", *source.parent.parts])
    imported = (f"from {package}.{source.stem} import ", f"from {package} import {source.stem}")
    assert tests.exists() and any(line.startswith(imported) for line in tests.read_text().splitlines())


def test_no_argument_has_a_name_that_inductor_uses_itself():
    reserved = set(inspect.signature(FallbackKernel.create.__func__).parameters) - {"args", "kwargs"}
    assert "kernel" in reserved
    for name, schema in registered().items():
        assert reserved.isdisjoint(argument.name for argument in schema.arguments), name


def test_the_operators_have_the_names_of_the_options():
    names = {argument.name for schema in registered().values() for argument in schema.arguments}
    assert {"tau", "keep_ratio", "recent_probes", "random_probes", "seed", "keep_recent", "queries", "kernel_"} <= names
    assert names.isdisjoint({"recent", "random", "all_queries", "use", "prompt"})


softcaps = pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])


def check(op, *args):
    """Run every check, the default; a result that lists fewer would be a silent gap."""
    assert dict.fromkeys(ALL, "SUCCESS") == opcheck(op, args)


@softcaps
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_token_scores(dtype, masked, groups, softcap):
    q, k, _, _, mask = tensors(dtype)
    given = (q, k, mask if masked else None, not masked, 0.3, softcap, 4, 3, 0, groups)
    check(ops.token_scores.default, *given)
    check(ops.token_scores.default, *given, True)


# Under tau < 1 the number of kept tokens depends on the data. opcheck's dynamic-shape check needs no flag for it: it
# traces with make_fx, whose ShapeEnv allows unbacked sizes, unlike Dynamo's (see backend._allow_data_dependent_sizes).
@pytest.mark.parametrize("rule", [(0.8, None), (1.0, None), (0.8, 0.4)], ids=["tau", "tau-1", "keep_ratio"])
@pytest.mark.parametrize("keep_recent", [1, 3])
def test_select_tokens(rule, keep_recent):
    q, k, *_ = tensors()
    scores, visible = torch.ops.zipvl.token_scores(q, k, None, True, 1.0, None, 4, 3, 0, 1)
    check(ops.select_tokens.default, scores, visible, *rule, keep_recent)
    check(ops.select_tokens.default, scores, visible, *rule, keep_recent, torch.tensor([2, 0]))
    others = (torch.tensor([2, 0]), None, 0.3, 1, scores * 2, Budget(tau=0.5).as_tensor())
    check(ops.select_tokens.default, scores, visible, *rule, keep_recent, *others)


def test_gather_kv():
    _, k, v, positions, _ = tensors()
    check(ops.gather_kv.default, k, v, positions, 0)


def test_hiding_rows():
    check(ops.hiding_rows.default, torch.ones(2, 1, 1, 9, dtype=torch.bool))
    check(ops.hiding_rows.default, torch.arange(9).view(1, 1, 1, 9) > 3)


def test_probe_positions():
    check(ops.probe_positions.default, tensors()[1], 4, 3, 0)


def test_token_positions():
    check(ops.token_positions.default, tensors()[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gather_tokens(dtype):
    _, k, _, positions, _ = tensors(dtype)
    check(ops.gather_tokens.default, k, positions, 0)
    # Spare rows are unwritten memory: the dynamic-shape check compares two runs bit for bit, so it cannot hold there.
    opcheck(ops.gather_tokens.default, (k, positions, 2), test_utils=sorted(ALL - {"test_aot_dispatch_dynamic"}))


@softcaps
@pytest.mark.parametrize("queries", ["selected", "all"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_sparse_attention(masked, queries, softcap):
    q, k, v, positions, mask = tensors()
    keys, values = ops.gather_tokens(k, positions, 0), ops.gather_tokens(v, positions, 0)
    given = (q, keys, values, positions, mask if masked else None, not masked, 0.3, softcap, queries)
    check(ops.sparse_attention.default, *given)


def test_other_tokens():
    check(ops.other_tokens.default, tensors()[3], 10)


@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_quantise_tokens(dtype, per):
    _, k, _, positions, _ = tensors(dtype)
    check(ops.quantise_tokens.default, k, positions, 4, per)


def test_to_host():
    check(ops.to_host.default, tensors()[1], tensors()[3])


def test_room_for_queries():
    check(ops.room_for_queries.default, tensors()[0], 3)


def test_note_queries():
    q = tensors()[0]
    check(ops.note_queries.default, torch.zeros(2, 4, 6, 8), q[:, :, :2].contiguous(), 5)


def quantised(bits=4):
    """Return the arguments of decode_quantised up to the mask, with seven of ten prompt tokens quantised."""
    q, k, v, positions, _ = tensors()
    others = ops.other_tokens(positions, 10)
    keys, values = ops.quantise_tokens(k, others, bits, "channel"), ops.quantise_tokens(v, others, 8, "token")
    return q, k, v, positions, 10, 12, *keys, *values


@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_restore_tokens(dtype, per):
    _, k, _, positions, _ = tensors(dtype)
    coded = ops.quantise_tokens(k, ops.other_tokens(positions, 10), 2, per)
    check(ops.restore_tokens.default, k, positions, *coded, 10)
    check(ops.restore_tokens.default, k, positions, k.clone(), None, 10)


@softcaps
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_decode_quantised(masked, m, softcap):
    q, *others = quantised()
    mask = torch.ones(2, 1, m, 12, dtype=torch.bool) if masked else None
    check(ops.decode_quantised.default, q[:, :, :m].contiguous(), *others, mask, 0.3, softcap)


def test_decode_quantised_torch():
    q, *others = quantised(2)
    check(ops.decode_quantised_torch.default, q[:, :, :1].contiguous(), *others, None, 0.3, None)


def test_append_tokens():
    _, k, v, _, _ = tensors()
    keys, values = torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16, 6)
    check(ops.append_tokens.default, keys, values, k[:, :, :3], v[:, :, :3], 5)


@softcaps
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_decode_attention(masked, m, softcap):
    q, k, v, positions, _ = tensors()
    mask = torch.ones(2, 1, m, 17, dtype=torch.bool) if masked else None
    check(ops.decode_attention.default, q[:, :, :m].contiguous(), k, v, positions, 10, 17, mask, 0.3, softcap)
    where, held = torch.arange(10).repeat(2, 1, 1), torch.tensor(9)
    check(ops.decode_attention.default, q[:, :, :m].contiguous(), k, v, where, 17, 17, mask, 0.3, softcap, held)


def test_kv_view():
    _, k, *_ = tensors()
    check(ops.kv_view.default, k, ops.token_positions(k[:, :, :8]), 8, 9)
    check(ops.kv_view.default, k, ops.token_positions(k), 10, 10, torch.tensor(9))


def test_fixed_rows():
    check(ops.fixed_rows.default, tensors()[1])


def test_fixed_positions():
    check(ops.fixed_positions.default, torch.tensor([[[0, 2, 5]], [[1, 2, 3]]]), 8, 4)


def test_row_count():
    check(ops.row_count.default, torch.tensor([[[0, 2, 5]], [[1, 2, 3]]]))


def test_with_room():
    check(ops.with_room.default, tensors()[1], 2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_token_scores_torch(masked, groups):
    q, k, _, _, mask = tensors(torch.float64)
    check(ops.token_scores_torch.default, q, k, mask if masked else None, not masked, 0.3, None, 4, 3, 0, groups)


def test_append_tokens_torch():
    _, k, v, _, _ = tensors()
    keys, values = torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16, 6)
    check(ops.append_tokens_torch.default, keys, values, k[:, :, :3], v[:, :, :3], 5)


def test_decode_attention_torch():
    q, k, v, positions, _ = tensors()
    new = q[:, :, :1].contiguous()
    check(ops.decode_attention_torch.default, new, k, v, positions, 10, 17, None, 0.3, None)


@softcaps
@pytest.mark.parametrize("rule", [(False, "selected"), (True, "selected"), (True, "all")])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_window_attention(masked, rule, softcap):
    q, k, v, positions, mask = tensors()
    kept = ops.gather_tokens(k, positions, 0), ops.gather_tokens(v, positions, 0)
    given = (q, k, v, *kept, positions, torch.ones(2, 10), mask if masked else None, not masked, 0.3, softcap)
    check(ops.window_attention.default, *given, 3, 2, *rule)


def test_held_rows():
    check(ops.held_rows.default, torch.tensor([[[0, 2, 5]], [[1, 2, 3]]]), 7)


def test_every_operator_is_checked():
    checked = Path(__file__).read_text()
    assert [name for name in registered() if f"ops.{name}.default" not in checked] == []
