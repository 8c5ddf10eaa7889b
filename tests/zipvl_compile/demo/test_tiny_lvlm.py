"""The shipped tiny LVLM: its scenes and questions, its processor, and what its checkpoint can do."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

import zipvl_compile.demo.tiny_lvlm.scenes as scenes_module
from zipvl_compile.demo.tiny_lvlm import CHECKPOINT
from zipvl_compile.demo.tiny_lvlm.batches import (
    IGNORED,
    kept_patches,
    pack_questions,
    packed_mask,
    patch_labels,
    pixel_values,
)
from zipvl_compile.demo.tiny_lvlm.build import WORD_ID, build_model, build_processor
from zipvl_compile.demo.tiny_lvlm.evaluate import (
    accuracy_per_kind,
    exact_match,
    generate_answers,
    questions_for_demo,
)
from zipvl_compile.demo.tiny_lvlm.questions import (
    COLUMN_WORDS,
    COUNT_WORDS,
    EOS,
    KINDS,
    MULTI_TOKEN_KINDS,
    ROW_WORDS,
    SINGLE_TOKEN_KINDS,
    VOCABULARY,
    Question,
    ask,
    hints,
)
from zipvl_compile.demo.tiny_lvlm.scenes import (
    CELL,
    COLOUR_NAMES,
    COLOURS,
    GRID,
    IMAGE_SIZE,
    IMAGE_TOKENS,
    MAX_DIGITS,
    MIN_DIGITS,
    PlacedDigit,
    draw_scene,
    split_indices,
)
from zipvl_compile.demo.tiny_lvlm.stages import answer_logits, patch_features


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()


def true_answer(prompt: str, digits: tuple[PlacedDigit, ...]) -> str:
    """Answer a prompt by reading its words, independently of the code that wrote it."""
    words = prompt.split()
    by_colour = {one.colour: one for one in digits}
    match words:
        case ["what", "digit", "is", "at", row, column, "?"]:
            return next(str(one.digit) for one in digits if (f"r{one.row + 1}", f"c{one.column + 1}") == (row, column))
        case ["what", "digit", "is", colour, "?"]:
            return str(by_colour[colour].digit)
        case ["what", "color", "is", digit, "?"]:
            (only,) = [one.colour for one in digits if str(one.digit) == digit]
            return only
        case ["which", "row", "is", colour, "in", "?"]:
            return f"r{by_colour[colour].row + 1}"
        case ["which", "column", "is", colour, "in", "?"]:
            return f"c{by_colour[colour].column + 1}"
        case ["how", "many", "digits", "are", "there", "?"]:
            return COUNT_WORDS[len(digits)]
        case ["how", "many", digit, "are", "there", "?"]:
            return COUNT_WORDS[Counter(str(one.digit) for one in digits)[digit]]
        case ["read", "all", "digits", ":"]:
            return " ".join(str(one.digit) for one in sorted(digits, key=lambda one: one.row * GRID + one.column))
        case ["read", *colours, ":"]:
            return " ".join(str(by_colour[colour].digit) for colour in colours)
    raise AssertionError(f"unknown prompt: {prompt}")


def test_splits_share_no_digit():
    train, held_out = (set(split_indices()[split].tolist()) for split in ("train", "held_out"))
    assert not train & held_out
    assert train | held_out == set(range(1797))
    assert len(held_out) == 359


def test_splits_share_no_picture():
    from sklearn.datasets import load_digits

    images = load_digits().images
    train, held_out = ({images[row].tobytes() for row in split_indices()[split]} for split in ("train", "held_out"))
    assert not train & held_out


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_scene_shows_what_it_lists(split, monkeypatch):
    monkeypatch.setattr(scenes_module, "NOISE", 0.0)
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = draw_scene(rng, split)
        assert scene.image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and scene.image.dtype == np.uint8
        assert MIN_DIGITS <= len(scene.digits) <= MAX_DIGITS
        assert list(scene.digits) == sorted(scene.digits)
        places = {(one.row, one.column) for one in scene.digits}
        assert len({one.colour for one in scene.digits}) == len(places) == len(scene.digits)

        cells = scene.image.reshape(GRID, CELL, GRID, CELL, 3).swapaxes(1, 2) / 255
        background = cells[next(place for place in np.ndindex(GRID, GRID) if place not in places)][0, 0]
        difference = cells - background
        assert set(zip(*np.nonzero(np.abs(difference).max(axis=(2, 3, 4)) > 0.02), strict=True)) == places
        for one in scene.digits:
            ink = difference[one.row, one.column].reshape(-1, 3)
            ink = ink[np.abs(ink).sum(1).argmax()]
            paints = np.array(list(COLOURS.values())) - background
            likeness = paints @ ink / np.linalg.norm(paints, axis=1)
            assert COLOUR_NAMES[likeness.argmax()] == one.colour


def test_same_seed_same_scene():
    first, second = (draw_scene(np.random.default_rng(3), "held_out") for _ in range(2))
    assert first.digits == second.digits and (first.image == second.image).all()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_scene(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(200):
        digits = draw_scene(rng, "held_out").digits
        question = ask(rng, digits, kind)
        assert question.kind == kind or kind == "digit_to_colour"
        assert question.answer == true_answer(question.prompt, digits)
        assert set(f"{question.prompt} {question.answer}".split()) <= set(VOCABULARY)
        if kind in SINGLE_TOKEN_KINDS:
            assert len(question.answer.split()) == 1


def test_digit_to_colour_falls_back_when_no_digit_is_unique():
    digits = (PlacedDigit(0, 0, 5, "red"), PlacedDigit(1, 1, 5, "blue"))
    question = ask(np.random.default_rng(0), digits, "digit_to_colour")
    assert question.kind == "colour_to_digit" and question.answer == "5"


@pytest.mark.parametrize(
    ("kind", "prompt", "answer", "expected"),
    [
        ("colour_to_digit", "what digit is red ?", "7", {3: "7"}),
        ("position_to_digit", "what digit is at r3 c5 ?", "7", {5: "7"}),
        ("count_digit", "how many 7 are there ?", "two", {2: "two"}),
        ("read_colours", "read red blue green :", "1 2 3", {1: "1", 2: "2", 3: "3"}),
        ("read_all", "read all digits :", "1 2 3", {}),
        ("count_all", "how many digits are there ?", "three", {}),
    ],
)
def test_hints_sit_on_the_words_that_the_answer_turns_on(kind, prompt, answer, expected):
    assert hints(Question(kind, prompt, answer)) == expected


def test_vocabulary_has_no_duplicates():
    assert len(WORD_ID) == len(VOCABULARY)
    assert len(ROW_WORDS) == len(COLUMN_WORDS) == GRID


def test_kept_patches_hold_every_digit():
    rng = np.random.default_rng(1)
    scenes = [draw_scene(rng) for _ in range(4)]
    kept = kept_patches(rng, scenes, 20)
    digits, colours = patch_labels(scenes)
    assert kept.shape == (4, 20) and (kept.diff(dim=1) > 0).all()
    for row, scene in enumerate(scenes):
        shown = [(index // GRID, index % GRID) for index in kept[row].tolist() if digits[row, index] < 10]
        assert shown == [(one.row, one.column) for one in scene.digits]
        assert [COLOUR_NAMES[index] for index in colours[row][kept[row]].tolist() if index < len(COLOUR_NAMES)] == [
            one.colour for one in scene.digits
        ]


def test_packed_questions_do_not_see_each_other():
    """The loss of a packed row is that of its questions asked one by one."""
    rng = np.random.default_rng(2)
    model = build_model(0).eval()
    scenes = [draw_scene(rng)]
    packed = pack_questions(rng, scenes, 5, dict.fromkeys(KINDS, 1.0))
    everything = torch.arange(IMAGE_TOKENS)[None]
    with torch.no_grad():
        together = answer_logits(model, patch_features(model, pixel_values(scenes)), everything, packed)
        apart = []
        for number in range(5):
            mine = packed.group[0] == number
            prefix = [WORD_ID["<bos>"], *[WORD_ID["<image>"]] * IMAGE_TOKENS]
            ids = torch.tensor([prefix + packed.ids[0, mine].tolist()])
            logits = model(input_ids=ids, pixel_values=pixel_values(scenes)).logits[0, len(prefix) :]
            apart.append(logits[packed.labels[0, mine] != IGNORED])
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=1e-4)
    assert (packed.labels == WORD_ID[EOS]).sum() == 5
    mask = packed_mask(packed.group, 3)[0, 0]
    assert mask[3:, :3].all() and not mask.triu(1).any()


def test_checkpoint_loads_without_warnings(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoProcessor.from_pretrained(CHECKPOINT)
        model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    printed = "".join(capfd.readouterr())
    assert not any(
        word in printed.lower() for word in ("warning", "missing", "unexpected", "deprecated", "newly initialized")
    )
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert model.config.text_config.num_key_value_heads < model.config.text_config.num_attention_heads
    assert not model.generation_config.do_sample
    assert model.generation_config.eos_token_id == WORD_ID[EOS]
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 10e6


def test_processor_expands_the_image(processor):
    question = next(questions_for_demo(1, seed=0))
    inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
    assert (inputs["input_ids"] == WORD_ID["<image>"]).sum() == IMAGE_TOKENS >= 256
    assert inputs["input_ids"][0, 0] == WORD_ID["<bos>"]
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True) == question.prompt.removeprefix(
        "<image> "
    )


@pytest.mark.parametrize("source", ["saved", "built"])
def test_processor_pixels_are_those_of_training(request, source):
    rng = np.random.default_rng(4)
    scenes = [draw_scene(rng, "held_out") for _ in range(3)]
    images = [Image.fromarray(scene.image) for scene in scenes]
    chosen = request.getfixturevalue("processor") if source == "saved" else build_processor()
    pixels = chosen(images=images, text=["<image> read all digits :"] * 3, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, pixel_values(scenes), atol=1e-5, rtol=0)


def test_readme_example(model, processor):
    question = next(questions_for_demo(1, seed=0, kinds=["colour_to_digit"]))
    inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8)
    assert output[0, -1] == WORD_ID[EOS]
    assert exact_match(
        processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), question.answer
    )


def test_padded_batch_answers_as_single_prompts_do(model, processor):
    questions = list(questions_for_demo(2 * len(KINDS), seed=11))
    padded = processor(
        images=[question.image for question in questions],
        text=[question.prompt for question in questions],
        padding=True,
        return_tensors="pt",
    )
    assert padded["attention_mask"].min() == 0 and padded["attention_mask"][:, -1].all()
    together = generate_answers(model, processor, questions, batch_size=len(questions))
    assert together == generate_answers(model, processor, questions, batch_size=1)


@pytest.mark.parametrize(
    ("kinds", "count", "floor"),
    [(SINGLE_TOKEN_KINDS, 161, 0.9), (MULTI_TOKEN_KINDS, 40, 0.7)],
    ids=["single", "multi"],
)
def test_accuracy_on_held_out_digits(model, processor, kinds, count, floor):
    rates = accuracy_per_kind(model, processor, questions_for_demo(count, seed=2024, kinds=kinds))
    assert np.mean(list(rates.values())) >= floor, rates


def test_exact_match_ignores_only_blanks():
    assert exact_match(" 1 2  3", "1 2 3")
    assert not exact_match("1 2 3 4", "1 2 3")
    assert not exact_match("12 3", "1 2 3")
