"""Questions to the bundled LVLM, and to others from a file."""

import json

import pytest
import torch

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from PIL import Image
from support.quiet import one_thread_without_gradients  # noqa: F401

from zipvl_compile.demo.prompts import prompt_inputs
from zipvl_compile.demo.tiny_lvlm.questions import KINDS
from zipvl_compile.evaluate.models import TINY_LVLM, load_picture_model
from zipvl_compile.evaluate.picture_task import PictureTask, bundled_questions, grouped, is_right, read_questions
from zipvl_compile.evaluate.variants import PICTURE_SCALE


@pytest.fixture(scope="module")
def bundled():
    task = PictureTask(TINY_LVLM, *load_picture_model(TINY_LVLM), bundled_questions(len(KINDS), "report"), "questions")
    return task, task.run({})


def test_dense_is_the_plain_eager_model(bundled):
    task, items = bundled
    for question, item in zip(task.questions, items, strict=True):
        inputs = prompt_inputs(task.processor, question.image, question.prompt)
        out = task.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = task.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
        assert item["answer"] == text and item["accuracy"] == (text == question.answer)
        assert item["kept"] == item["agreement"] == 1
        assert item["kv_bytes"] == 2 * 4 * 2 * 32 * 4 * inputs["input_ids"].shape[1]  # K and V, layers, heads, dim
    assert sum(item["accuracy"] for item in items) >= len(items) / 2


def test_where_every_token_is_kept_the_answers_are_those_of_dense(bundled):
    task, base = bundled
    done = []
    items = task.run({"tau": 1.0}, lambda: done.append(1))
    assert len(done) == task.count == len(items)
    for item, of_dense in zip(items, base, strict=True):
        assert {key: item[key] for key in ("answer", "accuracy", "kept", "agreement", "kv_bytes")} == {
            key: of_dense[key] for key in ("answer", "accuracy", "kept", "agreement", "kv_bytes")
        }
    flops = {(item["kv_bytes"], item["prefill_flops"]) for item in items}
    assert len(flops) == len(dict(flops)) > 1, "prompts of one length count alike: what is compiled is not counted"


def test_groups_are_kinds_and_lengths_of_answers(bundled):
    _, items = bundled
    groups = grouped(items)
    assert set(groups) == {*KINDS, "single_token", "multi_token"}
    assert {items[i]["groups"][0] for i in groups["multi_token"]} == {"read_all", "read_colours"}
    assert len(groups["single_token"]) + len(groups["multi_token"]) == len(items)
    assert grouped([{"groups": ("all", "single_token")}, {"groups": ("all", "multi_token")}]).keys() == {
        "single_token", "multi_token",
    }  # fmt: skip


def test_the_grid_of_the_bundled_model_cannot_be_made_smaller(bundled):
    task, _ = bundled
    assert task.takes({}) and task.takes({"tau": 0.9}) and not task.takes({PICTURE_SCALE: 0.63})


def test_a_smaller_picture_is_a_baseline_where_it_is_fewer_tokens(bundled, monkeypatch):
    task, base = bundled
    whole = task._inputs(task.questions[0], 1.0)
    n = whole["input_ids"].shape[1]
    monkeypatch.setattr(
        task, "_inputs", lambda question, scale: whole if scale == 1 else {"input_ids": torch.ones(1, 90)}
    )
    assert task.takes({PICTURE_SCALE: 0.5})
    # What is left of the prompt is a share of what it was, and the model is the dense one.
    monkeypatch.setattr(task, "_inputs", lambda question, scale: whole if scale == 1 else {
        "input_ids": whole["input_ids"][:, -4:], "attention_mask": whole["attention_mask"][:, -4:],
    })  # fmt: skip
    items = task.run({PICTURE_SCALE: 0.5})
    assert items[0]["kept"] == 4 / n and items[0]["kv_bytes"] == base[0]["kv_bytes"] * 4 // n


def test_splits_ask_about_other_scenes():
    pictures = {s: [q.image.tobytes() for q in bundled_questions(9, s)] for s in ("report", "choose")}
    assert not set(pictures["report"]) & set(pictures["choose"])
    assert pictures["report"] == [question.image.tobytes() for question in bundled_questions(18, "report")[:9]]


def test_right_answers_may_differ_in_case_and_a_full_stop():
    assert is_right("Stop.", "stop") and is_right(" 1  2 ", "1 2") and not is_right("1 2", "2 1")


def test_questions_of_a_file(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "what?", "answer": "red"}, {"image": "a.png", "question": "n?", "answer": 2}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = read_questions(path)
    assert (first.prompt, first.answer, first.image.size, second.answer) == ("what?", "red", (8, 8), "2")
    assert len(read_questions(path, 1)) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "expected a file"), ("", "at least one line"), ("{", "in line 1"), ('{"image": "a.png"}', "KeyError"),
     ('{"image": "no.png", "question": "", "answer": ""}', "no.png")],
)  # fmt: skip
def test_bad_files(tmp_path, text, said):
    path = tmp_path / "data.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_questions(path)
