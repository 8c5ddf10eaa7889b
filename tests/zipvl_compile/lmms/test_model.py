"""What the model adds to that of lmms-eval; `make test-lmms` has lmms-eval installed, and runs whole tasks, too."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import GenerationResult, TokenCounts, unwrap_generation_output
from lmms_eval.models import get_model, list_available_models
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history, log_metrics, reset_logged_metrics

from zipvl_compile.demo.tiny_lvlm import CHECKPOINT
from zipvl_compile.lmms import model as module
from zipvl_compile.lmms.arguments import parameters
from zipvl_compile.lmms.bases import ANY, BASES
from zipvl_compile.lmms.model import Measured, MeasuredModel, ZipVL, ZipVLSimple
from zipvl_compile.option_checks import CHECKS
from zipvl_compile.report.requests import RequestStats

TOOK = RequestStats("M", 1, 8, 3, 10.0, 2.0, 0)


def test_bases_are_models_of_lmms_eval():
    assert {ANY, *BASES.values()} <= set(list_available_models())


@pytest.mark.parametrize("name", ["llava_hf", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl_hf", "gemma3", ANY])
def test_no_base_has_an_argument_of_the_name_of_an_option(name):
    found = parameters(get_model(name))
    assert "pretrained" in found and set(found).isdisjoint({*CHECKS, "base", "backend"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": str(CHECKPOINT), "taw": 1}, "got 'taw'. Did you mean 'tau'"),
        ({"base": "llava_h"}, "'base': expected a model of lmms-eval, got 'llava_h'. Use one of .*llava_hf"),
        ({"base": "zipvl"}, "'base'"),
        ({"tau": 0.9}, "'pretrained'"),
    ],
)
def test_bad_arguments_are_named_before_a_model_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        ZipVL(**arguments)


def test_the_object_is_one_of_the_base():
    for kind, simple in ((ZipVL, False), (ZipVLSimple, True)):
        lm = kind(pretrained=str(CHECKPOINT), device="cpu", tau=0.9)
        base = get_model("llava_hf", force_simple=simple)
        assert isinstance(lm, base) and isinstance(lm, MeasuredModel) and lm.is_simple is simple
        assert type(lm).__name__ == "ZipVLLlavaHf" and type(lm).__module__ == base.__module__


def test_answers_carry_what_they_took_into_the_samples():
    with_counts = module._with_counts("generate_until", GenerationResult("a", TokenCounts(output_tokens=3)), [TOOK])
    text, counts = unwrap_generation_output(with_counts)
    assert text == "a" and counts.to_dict() == json.loads(json.dumps(counts.to_dict()))
    assert counts.to_dict() == {
        "output_tokens": 3, "prompt_tokens": 8, "kept": 1.0, "prefill_ms": 10.0, "decode_ms": 2.0,
    }  # fmt: skip
    assert unwrap_generation_output(module._with_counts("generate_until", "b", [])) == ("b", TokenCounts())
    assert module._with_counts("generate_until_multi_round", ["b"], [TOOK]) == ["b"]


def test_losses_stay_numbers():
    loss = (0.5, True)
    assert unwrap_generation_output(module._with_counts("loglikelihood", loss, [TOOK]))[0] == loss
    assert unwrap_generation_output(loss)[0] == "(0.5, True)"  # else the detour could go


@pytest.mark.parametrize("counted", [False, True])
def test_tokens_and_seconds_are_counted_once(counted):
    class Base:
        task_dict = {}  # noqa: RUF012

        def generate_until(self, asked):
            if counted:
                log_metrics(1.0, 6, 6.0)
            return ["a", "b"]

    class Both(Measured, Base):
        pass

    reset_logged_metrics()
    asked = [SimpleNamespace(task_name="task", doc_id=i) for i in range(2)]
    assert [
        one.text for one in module._measured(Both(), Base().generate_until, asked, "generate_until", [TOOK] * 2)
    ] == ["a", "b"]
    history = get_logged_metrics_history()
    assert sum(one["total_gen_tokens"] for one in history) == 6
    assert history[-1]["zipvl_generate_until_prefill_ms"] == 10.0
    assert history[-1]["total_elapsed_time"] == (0.0 if counted else pytest.approx(0.028))


def test_what_a_base_does_not_implement_it_does_not():
    class Base:
        task_dict = {}  # noqa: RUF012

        def loglikelihood(self, asked):
            raise NotImplementedError("not implemented for Base")

    class Both(Measured, Base):
        pass

    lm = Both()
    with pytest.raises(NotImplementedError, match="not implemented for Base"):
        lm.loglikelihood([])
    assert lm.calls is None and lm.task_dict is Base.task_dict
