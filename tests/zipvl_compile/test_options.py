"""The options of the backend: what each accepts, and errors that reach the user as a ValueError with a remedy."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.graph_modules import Small
from torch._dynamo.exc import BackendCompilerFailed

from zipvl_compile import policies
from zipvl_compile.kernels.budget import Budget
from zipvl_compile.options import OptionError, ZipVLOptions
from zipvl_compile.passes.policy import Policy
from zipvl_compile.policies.presets import PRESETS

NAN, INF = float("nan"), float("inf")
GOOD = {
    "tau": [1e-6, 0.5, 0.975, 1.0, 1],
    "keep_ratio": [None, 1e-6, 0.3, 1.0, 1],
    "recent_probes": [0, 1, 64, 10_000],
    "random_probes": [0, 1, 64, 10_000],
    "seed": [0, 1, 2**32],
    "keep_recent": [1, 5, 10_000],
    "keep_tokens": [None, 1, 64, 10_000],
    "floor": [0, 0.0, 0.25, 1.0, 1],
    "draw": ["random", "strided"],
    "score": ["normalised", "accumulated", "even", "value", "recent", "random"],
    "pooling": [1, 5, 7],
    "keep_first": [0, 4],
    "unselected": ["zero", "hold", "window", "all"],
    "window": [1, 64],
    "sinks": [0, 4],
    "kept_window": [True, False],
    "prefill": ["sparse", "dense"],
    "skip": ["attention"],
    "skip_in": [None],
    "dense_layers": [0, 4, 0.25, (), (0, 3)],
    "score_every": [0, 1, 4],
    "groups": ["layer", "kv_head"],
    "calibration": [None],
    "preset": [None],
    "policy": [None],
    "evict": ["drop", "host", "quantize", "keep"],
    "evict_bits": [2, 4, 8],
    "reselect_every": [0, 1, 100],
    "min_tokens": [None, 0, 1, 100_000],
    "reselect_tokens": [0, 128, 4096],
    "inner": ["inductor", "aot_eager", "eager"],
    "kernel": ["auto", "triton", "torch"],
    "mode": [None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
}
BAD = {
    "tau": [0, 0.0, -0.5, 1.01, 2, NAN, INF, "0.9", None, True, [0.9]],
    "keep_ratio": [0, 0.0, -0.5, 1.01, NAN, INF, "half", True, (0.5,)],
    "recent_probes": [-1, 1.5, 64.0, "64", None, True],
    "random_probes": [-1, 1.5, 64.0, "64", None, False],
    "seed": [-1, 0.5, "0", None, True],
    "keep_recent": [0, -1, 1.0, "1", None, True],
    "keep_tokens": [0, -1, 1.5, "64", True],
    "floor": [-0.1, 1.1, NAN, INF, "half", None, True],
    "draw": ["Random", "", None, 1],
    "score": ["norm", "", None, 1],
    "pooling": [0, -1, 2, 1.0, "5", None, True],
    "keep_first": [-1, 1.0, "4", None, True],
    "unselected": ["Zero", "none", "", None, 1, ["all"], {}],
    "window": [0, -1, 1.0, "64", None, True],
    "sinks": [-1, 1.0, "4", None, True],
    "kept_window": [0, 1, "yes", None],
    "prefill": ["Sparse", "", None, True],
    "skip": ["Layer", "", None, True],
    "skip_in": [3, 0, 1.0, "all", (-1,), (0.5,), True],
    "dense_layers": [-1, 1.0, "4", None, True, (0, -1), ("a",)],
    "score_every": [-1, 1.0, "2", None, True],
    "calibration": ["", 1, True],
    "preset": ["best", "", 1, True],
    "policy": ["best", "", 1, True],
    "groups": ["head", None, 1],
    "reselect_tokens": [-1, 1, 127, 128.0, "128", None, True, False],
    "evict_bits": [0, 1, 3, 16, 4.0, "4", None, True],
    "reselect_every": [-1, 1.5, "100", None, True],
    "evict": ["Drop", "none", None, True, False, ["keep"]],
    "min_tokens": [-1, 0.5, "512", True],
    "inner": ["triton", "", None, 0, {}],
    "kernel": ["Triton", "cuda", None],
    "mode": ["fast", "", 3, ["default"], True],
}
NAMES = [field.name for field in dataclasses.fields(ZipVLOptions)]


def pairs(table):
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


def test_the_tables_below_cover_every_option():
    assert set(GOOD) == set(BAD) == set(NAMES)


@pytest.mark.parametrize(("name", "value"), pairs(GOOD))
def test_good_value(name, value):
    parsed = ZipVLOptions.parse({name: value})
    assert getattr(parsed, name) == value
    budgets = {"tau", "keep_ratio", "keep_tokens", "floor"} if name in ("keep_ratio", "keep_tokens") else {name}
    usual = ZipVLOptions.parse()
    assert all(getattr(parsed, other) == getattr(usual, other) for other in NAMES if other not in budgets)


@pytest.mark.parametrize(("name", "value"), pairs(BAD))
def test_bad_value_is_named_with_what_was_expected_and_what_to_do(name, value):
    with pytest.raises(ValueError) as raised:
        ZipVLOptions.parse({name: value})
    message = str(raised.value)
    assert message.startswith(f"zipvl option {name!r}: expected ")
    assert f", got {value!r}. " in message
    assert message.rstrip().endswith(".") and len(message.split(f"got {value!r}. ")[1]) > 5, "a remedy follows"


def test_defaults():
    assert ZipVLOptions.parse() == ZipVLOptions.parse({}) == ZipVLOptions.parse({"preset": None})
    paper = ZipVLOptions.parse({"preset": "paper"})
    asked = ("tau", "keep_ratio", "floor", "recent_probes", "random_probes", "seed", "keep_recent", "score")
    assert [getattr(paper, name) for name in asked] == [0.975, None, 0.0, 64, 64, 0, 1, "normalised"]
    assert (paper.unselected, paper.prefill, paper.dense_layers, paper.score_every) == ("zero", "sparse", 0, 1)
    assert ZipVLOptions.parse({"policy": "paper"}) == dataclasses.replace(paper, preset=None, policy="paper")


@pytest.mark.parametrize(("former", "now"), [("selected", "zero"), ("all", "all")])
def test_the_former_name_of_what_unselected_tokens_get(former, now):
    assert ZipVLOptions.parse({"preset": "paper", "queries": former}).unselected == now
    with pytest.raises(ValueError, match=r'expected "selected" or "all", got 1. It is unselected='):
        ZipVLOptions.parse({"queries": 1})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_states_options_that_may_be_changed_one_by_one(name):
    asked = {key: value for key, value in PRESETS[name].items() if key != "policy"}
    parsed = ZipVLOptions.parse({"preset": name})
    assert all(getattr(parsed, key) == value for key, value in asked.items())
    assert ZipVLOptions.parse({"preset": name, "keep_recent": 9}) == dataclasses.replace(parsed, keep_recent=9)
    given = ZipVLOptions.parse({"preset": name, "keep_tokens": 50})
    assert (given.keep_tokens, given.keep_ratio) == (50, None), "one budget takes the place of another"
    with pytest.raises(OptionError, match="'preset' and 'policy': expected one of them"):
        ZipVLOptions.parse({"preset": name, "policy": "paper"})


@pytest.mark.parametrize("name", policies.names())
def test_a_policy_states_fields_that_may_be_changed_one_by_one(name):
    rule = policies.policy(name)
    parsed = ZipVLOptions.parse({"policy": name})
    assert all(getattr(parsed, field.name) == getattr(rule, field.name) for field in dataclasses.fields(Policy))
    given = ZipVLOptions.parse({"policy": name, "tau": 0.5})
    assert given.budget == Budget(tau=0.5, floor=rule.floor), "one budget takes the place of another"
    given = ZipVLOptions.parse({"policy": name, "keep_ratio": 0.1})
    assert given.budget == Budget(keep_ratio=0.1), "a fixed number is what is kept"
    given = ZipVLOptions.parse({"policy": name, "keep_ratio": 0.1, "floor": 0.2})
    assert given.budget == Budget(keep_ratio=0.1, floor=0.2), "unless a floor is asked for"


@pytest.mark.parametrize("unselected", ["zero", "hold"])
def test_a_window_needs_rows_that_attend(unselected):
    with pytest.raises(OptionError, match=f"'kept_window': expected .* got unselected='{unselected}'"):
        ZipVLOptions.parse({"unselected": unselected, "kept_window": True})
    with pytest.raises(OptionError, match="'kept_window'"):
        ZipVLOptions.parse({"policy": "paper", "kept_window": True})
    # One that a preset brings along gives way.
    assert ZipVLOptions.parse({"unselected": unselected}).unselected == unselected


def test_flags_stay_flags():
    """The operators take a bool, and no 1."""
    parsed = ZipVLOptions.parse({"kept_window": True, "score_every": 3})
    assert parsed.kept_window is True and parsed.score_every == 3


def test_options_cannot_change_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ZipVLOptions().tau = 0.5


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tua", "Did you mean 'tau'?"),
        ("keep_rate", "Did you mean 'keep_ratio'?"),
        ("recent_probe", "Did you mean 'recent_probes'?"),
        ("Unselected", "Did you mean 'unselected'?"),
        ("mintokens", "Did you mean 'min_tokens'?"),
        ("xyz", "Remove it."),
        (7, "Remove it."),
    ],
)
def test_unknown_name_gets_a_hint_and_the_list(name, hint):
    with pytest.raises(ValueError) as raised:
        ZipVLOptions.parse({name: 1})
    message = str(raised.value)
    assert message.startswith(f"zipvl option {name!r}: expected one of ")
    assert message.endswith(hint)
    assert all(option in message for option in NAMES)


def test_at_least_one_probe_row():
    assert ZipVLOptions.parse({"recent_probes": 0}).random_probes == 64
    with pytest.raises(ValueError, match="'recent_probes' and 'random_probes': expected at least one probe row"):
        ZipVLOptions.parse({"recent_probes": 0, "random_probes": 0})


def test_tau_and_keep_ratio_exclude_each_other():
    assert ZipVLOptions.parse({"tau": 0.9, "keep_ratio": None}).tau == 0.9
    assert ZipVLOptions.parse({"keep_ratio": 0.3}).keep_ratio == 0.3
    for tau in (0.9, ZipVLOptions.tau):
        with pytest.raises(OptionError, match=rf"'tau' and 'keep_ratio': expected one of them, got tau={tau} and"):
            ZipVLOptions.parse({"keep_ratio": 0.3, "tau": tau})


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_mode_is_inductors_only(inner):
    assert ZipVLOptions.parse({"inner": "inductor"}, "max-autotune").mode == "max-autotune"
    assert ZipVLOptions.parse({"inner": inner, "mode": None}).inner == inner
    for given in (({"inner": inner, "mode": "max-autotune"},), ({"inner": inner}, "max-autotune")):
        with pytest.raises(OptionError, match=rf"'mode': expected inner='inductor'.*got.*inner='{inner}'\. Leave"):
            ZipVLOptions.parse(*given)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("tau", np.float64(0.9), float),
        ("tau", np.float32(0.5), float),
        ("tau", Fraction(1, 2), float),
        ("tau", np.int64(1), int),
        ("keep_ratio", np.float16(0.25), float),
        ("seed", np.uint64(2**63 - 1), int),
        ("min_tokens", np.int32(3), int),
        ("keep_recent", np.int64(3), int),
    ],
)
def test_numbers_of_numpy_become_pythons(name, value, kind):
    stored = getattr(ZipVLOptions.parse({name: value}), name)
    assert type(stored) is kind and stored == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("tau", np.float64("nan")), ("tau", np.bool_(True)), ("seed", np.float64(3)), ("keep_recent", np.int64(0)),
     ("min_tokens", np.bool_(False)), ("tau", np.array([0.5])), ("inner", np.array(["eager", "eager"]))],
)  # fmt: skip
def test_other_things_of_numpy_are_refused(name, value):
    with pytest.raises(OptionError, match=f"zipvl option '{name}': expected"):
        ZipVLOptions.parse({name: value})


def test_mode_comes_by_either_way():
    assert ZipVLOptions.parse(mode="max-autotune").mode == "max-autotune"
    assert ZipVLOptions.parse({"mode": "max-autotune"}).mode == "max-autotune"
    assert ZipVLOptions.parse({"tau": 0.5}, "max-autotune") == ZipVLOptions.parse({"tau": 0.5, "mode": "max-autotune"})


def test_the_users_dictionary_stays_as_it_is():
    given = {"tau": 0.5}
    ZipVLOptions.parse(given, mode="default")
    assert given == {"tau": 0.5}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


BY_COMPILE = {
    "value": ({"options": {"tau": 2}}, "zipvl option 'tau': expected a fraction in (0, 1], got 2."),
    "name": ({"options": {"tua": 0.5}}, "Did you mean 'tau'?"),
    "groups": ({"options": {"groups": "head"}}, 'zipvl option \'groups\': expected "layer" or "kv_head", got'),
    "kernel": ({"options": {"kernel": "cuda"}}, 'zipvl option \'kernel\': expected "auto", "triton" or "torch"'),
    "mode": ({"mode": "fast"}, "zipvl option 'mode': expected None or a mode of torch.compile, got 'fast'."),
    "mode-in-options": ({"options": {"mode": "fast"}}, "zipvl option 'mode'"),
    "mode-and-inner": ({"options": {"mode": "default", "inner": "eager"}}, "expected inner='inductor'"),
    "both-rules": ({"options": {"tau": 0.9, "keep_ratio": 0.5}}, "expected one of them"),
    "probes": ({"options": {"recent_probes": 0, "random_probes": 0}}, "at least one probe row"),
}


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
@pytest.mark.parametrize("case", BY_COMPILE)
def test_the_user_of_compile_gets_a_value_error(case, how):
    given, message = BY_COMPILE[case]
    model = Small().eval()
    if how == "model.compile":
        model.compile(backend="zipvl", **given)
    else:
        model = torch.compile(model, backend="zipvl", **given)
    with pytest.raises(ValueError) as raised:
        model(torch.ones(1, 3))
    assert isinstance(raised.value, OptionError) and not isinstance(raised.value, BackendCompilerFailed)
    assert str(raised.value).startswith("zipvl option") and message in str(raised.value)


def test_which_layers_are_skipped_needs_skipped_layers():
    with pytest.raises(OptionError, match="'skip_in': expected skip='layer'"):
        ZipVLOptions.parse({"skip_in": [1]})
    with pytest.raises(OptionError, match="'skip': expected unselected='zero'"):
        ZipVLOptions.parse({"skip": "layer"})
    parsed = ZipVLOptions.parse({"skip": "layer", "skip_in": [1, 4]})
    assert parsed.of_layer(1).unselected == "zero" and parsed.of_layer(1).skip == "layer"
    assert parsed.of_layer(2).unselected == "all" and parsed.of_layer(2).skip == "attention"
