"""What a user does with quantised weights and with layers that scale each token: compared with the eager model."""

import functools
import importlib.util

import pytest
import torch
from support import tiny_llava
from torch import nn

import zipvl_compile
from zipvl_compile.pipeline import leaving_out
from zipvl_compile.report.compile_report import collect


class PerToken(nn.Module):
    """A projection that divides by the size of each token, as dynamic int8 does; without an epsilon."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True) / 127
        return nn.functional.linear((x / step).round() * step, self.weight)


def torchao(name, **options):
    """Quantise the decoder's linears with a configuration of torchao."""

    def change(decoder):
        quantization = pytest.importorskip("torchao.quantization")
        options_ = {key: make(quantization) for key, make in options.items()}
        quantization.quantize_(decoder, getattr(quantization, name)(**options_))

    return change


def quanto(weights):
    def change(decoder):
        library = pytest.importorskip("optimum.quanto")
        library.quantize(decoder, weights=getattr(library, weights))
        library.freeze(decoder)

    return change


def bitsandbytes(bits, **options):
    """Put its layers in the place of linears, as transformers does it with `load_in_4bit` and `load_in_8bit`."""

    def change(decoder):
        library = pytest.importorskip("bitsandbytes").nn
        layer, weights = {
            4: (library.Linear4bit, functools.partial(library.Params4bit, quant_type="nf4")),
            8: (library.Linear8bitLt, functools.partial(library.Int8Params, has_fp16_weights=False)),
        }[bits]
        for parent in list(decoder.modules()):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    new = layer(linear.in_features, linear.out_features, bias=False, **options)
                    new.weight = weights(linear.weight.data, requires_grad=False)
                    setattr(parent, name, new.to(linear.weight.device).eval())  # `to` quantises

    return change


def per_token(decoder):
    for layer in decoder.layers:
        layer.self_attn.o_proj = PerToken(layer.self_attn.o_proj)


DYNAMIC = "Int8DynamicActivationInt8WeightConfig"
GROUPS = {"weight_dtype": lambda q: torch.int4, "granularity": lambda q: q.PerGroup(32)}
LAYERS = {
    "int8 weights": torchao("Int8WeightOnlyConfig"),
    "int4 weights": torchao("IntxWeightOnlyConfig", **GROUPS),
    "int8 dynamic": torchao(DYNAMIC),
    "int8 dynamic, asymmetric": torchao(DYNAMIC, act_mapping_type=lambda q: q.MappingType.ASYMMETRIC),
    "int8 dynamic, one scale": torchao(DYNAMIC, granularity=lambda q: [q.PerTensor(), q.PerRow()]),
    "quanto int8": quanto("qint8"),
    "quanto int4": quanto("qint4"),
    "bitsandbytes nf4": bitsandbytes(4, compute_dtype=torch.float32),
    "bitsandbytes int8": bitsandbytes(8, has_fp16_weights=False),
    "bitsandbytes int8, outliers apart": bitsandbytes(8, has_fp16_weights=False, threshold=6.0),
    "per token": per_token,
}
# Their attention output is zero for tokens that are not kept; that of the others is dense, over a compacted cache.
REFUSE = ("int8 dynamic, one scale", "per token", *(name for name in LAYERS if name.startswith("bitsandbytes")))
TAKE_ZEROS = set(LAYERS) - set(REFUSE)


UNSIGNED = "torchao.kernel.intmm._cpu_is_vnni_supported"


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def signed_products_on_every_cpu(monkeypatch):
    """On processors with VNNI and without AMX, torchao adds 128 to all numbers and takes it back from the product."""
    if importlib.util.find_spec("torchao"):
        monkeypatch.setattr(UNSIGNED, lambda: False, raising=False)


def changed(kind):
    model = tiny_llava.model()
    LAYERS[kind](model.model.language_model)
    return model


def decoder(kind):
    """Return the decoder of the model alone, which compiles in half the time."""
    return changed(kind).model.language_model


def prompt(batch=1):
    return torch.randint(6, 128, (batch, 60), generator=torch.Generator().manual_seed(0))


def hidden(model, ids, **options):
    """Return the last hidden states through zipvl as if the newest row alone were read, so that others may be zero."""
    torch._dynamo.reset()
    given = {"min_tokens": 0, "inner": "eager"} | options
    with torch.no_grad(), leaving_out("read_demands"):
        return torch.compile(model, backend="zipvl", options={"policy": "paper"} | given)(
            ids, use_cache=True
        ).last_hidden_state


def pruned(run, *given, **options):
    """Return what a call says of the projections of every layer."""
    with collect() as reports:
        run(*given, **options)
    return [str(one) for report in reports for one in report.pruned]


@pytest.mark.parametrize("kind", LAYERS)
def test_with_every_token_kept_the_hidden_states_are_the_eager_ones(kind):
    model, x = decoder(kind), prompt()
    with torch.no_grad():
        expected = model(x).last_hidden_state
    for inner in ("eager", "aot_eager"):
        torch.testing.assert_close(hidden(model, x, tau=1.0, inner=inner), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "options"), [(1, {"tau": 0.8}), (2, {"keep_ratio": 0.4})], ids=["tau", "ratio"])
@pytest.mark.parametrize("kind", LAYERS)
def test_pruning_changes_no_number(kind, batch, options):
    model, x = decoder(kind), prompt(batch)
    with leaving_out("prune_projections", "demand_rows"):
        whole = hidden(model, x, **options)
    assert whole.isfinite().all()
    torch.testing.assert_close(hidden(model, x, **options), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_where_the_attention_stays_dense(kind):
    model, x = decoder(kind), prompt()
    said = pruned(hidden, model, x, tau=0.8)
    assert said and all(("the attention is dense" in line) is (kind not in TAKE_ZEROS) for line in said), said


@pytest.mark.parametrize("kind", REFUSE)
def test_by_the_default_rule_no_row_is_zero_and_every_layer_is_sparse(kind):
    model, x, rule = decoder(kind), prompt(), {"policy": "union", "keep_ratio": 0.4, "window": 8}
    said = pruned(hidden, model, x, **rule)
    assert said and all("every token attends to its window" in line for line in said)
    found = hidden(model, x, **rule)
    with leaving_out("keep_true_rows"):  # as where every layer takes rows of zeros
        torch.testing.assert_close(found, hidden(model, x, **rule))
    with torch.no_grad():
        dense = model(x).last_hidden_state
    assert found.isfinite().all() and not torch.allclose(found, dense, rtol=1e-3, atol=1e-3)


def test_products_of_unsigned_numbers_stay_dense_with_the_reason(monkeypatch):
    """A row of zeros gives zero only as the difference of two numbers that nobody has proven to be equal."""
    intmm = pytest.importorskip("torchao.kernel.intmm")
    if not hasattr(intmm, "_cpu_is_vnni_supported"):
        pytest.skip("this torchao has signed products only")
    monkeypatch.setattr(UNSIGNED, lambda: True)
    monkeypatch.setattr("torchao.kernel.intmm._cpu_is_amx_tile_supported", lambda: False)
    model, x = decoder("int8 dynamic"), prompt()
    said = pruned(hidden, model, x, tau=0.8)
    assert said and all("the attention is dense" in line and "row of zeros is not known" in line for line in said)
    with torch.no_grad():
        expected = model(x).last_hidden_state
    torch.testing.assert_close(hidden(model, x, tau=1.0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8 dynamic", "per token"])
def test_greedy_answers_with_every_token_kept(kind):
    model, x = changed(kind), tiny_llava.inputs(batch=2, pad=5) if kind != "per token" else tiny_llava.inputs(batch=2)
    expected = model.generate(**x, max_new_tokens=6, do_sample=False)
    model.compile(backend="zipvl", options={"min_tokens": 0, "inner": "eager", "tau": 1.0})
    assert model.generate(**x, max_new_tokens=6, do_sample=False).tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("tau", [1.0, 0.8])
def test_dynamic_int8_under_inductor(tau):
    """Inductor rounds otherwise than eager code, and so does int8 after it: plain Inductor is the measure at tau=1."""
    model, x = decoder("int8 dynamic"), prompt()
    found = hidden(model, x, tau=tau, inner="inductor")
    torch._dynamo.reset()
    if tau == 1.0:
        with torch.no_grad():
            expected = torch.compile(model)(x, use_cache=True).last_hidden_state
    else:
        with leaving_out("prune_projections", "demand_rows"):
            expected = hidden(model, x, tau=tau, inner="inductor")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_that_are_read_are_kept_where_the_attention_stays_dense():
    """Two rules meet: true rows for what scales each token, and kept tokens for the rows whose logits are read."""
    torch._dynamo.reset()
    x, answers = tiny_llava.inputs(text=30), 12
    f = tiny_llava.model()
    per_token(f.model.language_model)
    expected = f(**x, logits_to_keep=answers).logits
    f.compile(backend="zipvl", options={"inner": "eager", "min_tokens": 0, "keep_ratio": 0.3, "policy": "paper"})
    out = f(**x, logits_to_keep=answers)
    torch.testing.assert_close(out.logits, expected, atol=2e-5, rtol=1e-4)
    n = x["input_ids"].shape[1]
    for kept in zipvl_compile.kept_tokens(out):
        assert kept.shape[2] < n and torch.equal(kept[0, 0, -answers:], torch.arange(n - answers, n))
