"""The stages of training and the recipe they follow; what they are for is told in ``train``."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from zipvl_compile.demo.tiny_lvlm.batches import (
    IGNORED,
    NO_DIGIT,
    PackedQuestions,
    kept_patches,
    pack_questions,
    packed_mask,
    patch_labels,
    pixel_values,
)
from zipvl_compile.demo.tiny_lvlm.build import WORD_ID
from zipvl_compile.demo.tiny_lvlm.questions import BOS, COLUMN_WORDS, DIGIT_WORDS, EOS, KINDS, NOTHING, ROW_WORDS
from zipvl_compile.demo.tiny_lvlm.scenes import (
    COLOUR_NAMES,
    GRID,
    IMAGE_TOKENS,
    MAX_DIGITS,
    MIN_DIGITS,
    Scene,
    Split,
    draw_scene,
)


@dataclass(frozen=True)
class Recipe:
    """All hyper-parameters of the shipped checkpoint."""

    seed: int = 0
    align_steps: int = 600
    align_batch: int = 16
    align_lr: float = 2e-3
    align_max_digits: int = 64
    compact_steps: int = 3000
    compact_batch: int = 16
    compact_lr: float = 2e-3
    compact_patches: tuple[int, int] = (10, 64)
    full_steps: int = 3000
    full_batch: int = 8
    full_lr: float = 1e-3
    full_vision_share: float = 0.2  # of the rate
    full_min_patches: int = 64
    polish_steps: int = 2000
    polish_lr: float = 6e-4
    questions_per_image: int = 24
    weight_decay: float = 0.05
    question_weights: dict[str, float] = field(
        default_factory=lambda: _weights(
            colour_to_column=1.5, count_digit=1.5, count_all=0.5, read_all=2.0, read_colours=1.5
        )
    )
    polish_weights: dict[str, float] = field(
        default_factory=lambda: _weights(position_to_digit=2.0, count_digit=2.0, read_all=3.0, read_colours=2.0)
    )


def _weights(**weights: float) -> dict[str, float]:
    """How often every kind is asked: once, unless told otherwise."""
    return dict.fromkeys(KINDS, 1.0) | weights


def patch_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Image tokens as the language model gets them: float32 (batch, IMAGE_TOKENS, hidden)."""
    return model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state[:, 1:])


def answer_logits(
    model: LlavaForConditionalGeneration, features: torch.Tensor, kept: torch.Tensor, packed: PackedQuestions
) -> torch.Tensor:
    """Logits at the places that have a label, float32 (answer words of the whole batch, vocabulary).

    features: (batch, IMAGE_TOKENS, hidden).  kept: patches that stay in the sequence, (batch, n), ascending.
    """
    words = model.get_input_embeddings()(packed.ids)
    start = model.get_input_embeddings()(torch.full((len(kept), 1), WORD_ID[BOS]))
    patches = features.gather(1, kept[:, :, None].expand(-1, -1, features.shape[-1]))
    prefix = 1 + kept.shape[1]
    positions = torch.cat([torch.zeros_like(kept[:, :1]), 1 + kept, 1 + IMAGE_TOKENS + packed.positions], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([start, patches, words], dim=1),
        attention_mask=packed_mask(packed.group, prefix),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state[:, prefix:]
    return model.lm_head(hidden[packed.labels != IGNORED])


def align(model: LlavaForConditionalGeneration, recipe: Recipe) -> Iterator[str | None]:
    """Stage ``align``.  Like every stage it yields once per step: a line to print, or None."""
    rng = np.random.default_rng([recipe.seed, 0])
    table = model.get_input_embeddings().get_parameter("weight").detach()
    table = table / math.sqrt(table.shape[1])
    words = {
        "digit": (*DIGIT_WORDS, NOTHING),
        "colour": (*COLOUR_NAMES, NOTHING),
        "row": ROW_WORDS,
        "column": COLUMN_WORDS,
    }
    codes = {name: table[[WORD_ID[word] for word in group]] for name, group in words.items()}
    parameters = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.align_lr, weight_decay=0.01)
    patch = torch.arange(IMAGE_TOKENS)
    for step in range(recipe.align_steps):
        _set_rate(optimizer, step, recipe.align_steps, warmup=50)
        scenes = _scenes(rng, recipe.align_batch, MIN_DIGITS, recipe.align_max_digits)
        digits, colours = patch_labels(scenes)
        targets = {
            "digit": digits,
            "colour": colours,
            "row": (patch // GRID).expand_as(digits),
            "column": (patch % GRID).expand_as(digits),
        }
        # Background is nearly everywhere and easy: it must not drown the digits.
        weight = torch.where(digits == NO_DIGIT, 0.05, 1.0).flatten()
        features = patch_features(model, pixel_values(scenes))
        loss = 1e-3 * features.square().mean()
        for name, target in targets.items():
            logits = features @ codes[name].T
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            loss = loss + (each * weight).sum() / weight.sum()
        _update(optimizer, loss)
        reports = _is_report(step, recipe.align_steps, every=100)
        yield f"loss {loss.item():.3f}, {_patch_accuracy(model, codes)}" if reports else None


def compact(model: LlavaForConditionalGeneration, recipe: Recipe) -> Iterator[str | None]:
    """Stage ``compact``: the scenes grow from one digit to full size, then the background grows."""
    rng = np.random.default_rng([recipe.seed, 1])
    optimizer = _optimizer(recipe, [(_language_parameters(model), recipe.compact_lr)])
    steps, (fewest, most) = recipe.compact_steps, recipe.compact_patches
    for step in range(steps):
        _set_rate(optimizer, step, steps, warmup=100)
        growth = min(1.0, step / (0.3 * steps))
        high = 2 + int((MAX_DIGITS - 2) * growth)
        scenes = _scenes(rng, recipe.compact_batch, MIN_DIGITS if growth == 1 else 1, high)
        spread = max(0.0, step / steps - 0.3) / 0.7
        kept = kept_patches(rng, scenes, fewest + int((most - fewest) * spread))
        packed = pack_questions(rng, scenes, recipe.questions_per_image, recipe.question_weights, with_hints=True)
        with torch.no_grad():
            features = patch_features(model, pixel_values(scenes))
        line = _answer_step(model, optimizer, features, kept, packed)
        reports = _is_report(step, steps, every=250)
        yield f"{line}, held out {_packed_accuracy(model, recipe, kept.shape[1])}" if reports else None


def full(model: LlavaForConditionalGeneration, recipe: Recipe) -> Iterator[str | None]:
    """Stage ``full``: all weights, whole images or most of them."""
    rng = np.random.default_rng([recipe.seed, 2])
    return _whole_model(model, recipe, rng, recipe.full_steps, recipe.full_lr, recipe.question_weights)


def polish(model: LlavaForConditionalGeneration, recipe: Recipe) -> Iterator[str | None]:
    """Stage ``polish``: as ``full``, at a smaller rate and with more of the questions that are still weak."""
    rng = np.random.default_rng([recipe.seed, 3])
    return _whole_model(model, recipe, rng, recipe.polish_steps, recipe.polish_lr, recipe.polish_weights)


STAGES: dict[str, Callable[[LlavaForConditionalGeneration, Recipe], Iterator[str | None]]] = {
    "align": align,
    "compact": compact,
    "full": full,
    "polish": polish,
}


def _whole_model(
    model: LlavaForConditionalGeneration,
    recipe: Recipe,
    rng: np.random.Generator,
    steps: int,
    rate: float,
    weights: dict[str, float],
) -> Iterator[str | None]:
    vision = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    groups = [(_language_parameters(model), rate), (vision, rate * recipe.full_vision_share)]
    optimizer = _optimizer(recipe, groups)
    for step in range(steps):
        _set_rate(optimizer, step, steps, warmup=50)
        scenes = _scenes(rng, recipe.full_batch, MIN_DIGITS, MAX_DIGITS)
        count = IMAGE_TOKENS if step % 2 else int(rng.integers(recipe.full_min_patches, IMAGE_TOKENS))
        kept = kept_patches(rng, scenes, count)
        packed = pack_questions(rng, scenes, recipe.questions_per_image, weights, with_hints=True)
        line = _answer_step(model, optimizer, patch_features(model, pixel_values(scenes)), kept, packed)
        reports = _is_report(step, steps, every=250)
        yield f"{line}, held out {_packed_accuracy(model, recipe)}" if reports else None


def _answer_step(
    model: LlavaForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    features: torch.Tensor,
    kept: torch.Tensor,
    packed: PackedQuestions,
) -> str:
    logits = answer_logits(model, features, kept, packed)
    labels = packed.labels[packed.labels != IGNORED]
    loss = F.cross_entropy(logits, labels)
    _update(optimizer, loss)
    return f"loss {loss.item():.3f}, right {(logits.argmax(-1) == labels).float().mean():.3f}"


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([one for group in optimizer.param_groups for one in group["params"]], 1.0)
    optimizer.step()


def _optimizer(recipe: Recipe, groups: list[tuple[list[torch.nn.Parameter], float]]) -> torch.optim.AdamW:
    """AdamW over (parameters, rate) groups, without weight decay on norms and biases."""
    split = []
    for parameters, rate in groups:
        matrices = [parameter for parameter in parameters if parameter.dim() > 1]
        others = [parameter for parameter in parameters if parameter.dim() <= 1]
        split.append({"params": matrices, "lr": rate, "weight_decay": recipe.weight_decay})
        split.append({"params": others, "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(split, betas=(0.9, 0.98))


def _set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: int) -> None:
    """Linear warm-up, then a cosine down to 2% of each group's rate."""
    factor = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def _language_parameters(model: LlavaForConditionalGeneration) -> list[torch.nn.Parameter]:
    return [*model.model.language_model.parameters(), *model.lm_head.parameters()]


def _scenes(rng: np.random.Generator, count: int, low: int, high: int, split: Split = "train") -> list[Scene]:
    return [draw_scene(rng, split, low, high) for _ in range(count)]


def _is_report(step: int, steps: int, every: int) -> bool:
    return (step + 1) % every == 0 or step + 1 == steps


@torch.no_grad()
def _patch_accuracy(model: LlavaForConditionalGeneration, codes: dict[str, torch.Tensor]) -> str:
    """On how many held-out digits the patch says the right word with a probability above one half."""
    scenes = _scenes(np.random.default_rng(5), 32, 16, 16, "held_out")
    digits, colours = patch_labels(scenes)
    there = digits != NO_DIGIT
    features = patch_features(model, pixel_values(scenes))[there]
    truths = {
        "digit": digits[there],
        "colour": colours[there],
        "row": there.nonzero()[:, 1] // GRID,
        "column": there.nonzero()[:, 1] % GRID,
    }
    lines = []
    for name, truth in truths.items():
        chance = (features @ codes[name].T).softmax(-1).gather(-1, truth[:, None])
        lines.append(f"{name} {(chance > 0.5).float().mean():.3f}")
    return f"held out {', '.join(lines)}"


@torch.no_grad()
def _packed_accuracy(model: LlavaForConditionalGeneration, recipe: Recipe, patches: int = IMAGE_TOKENS) -> str:
    """Share of rightly predicted answer words per kind on held-out digits (previous words given)."""
    rng = np.random.default_rng(123)
    right, total = np.zeros(len(KINDS)), np.zeros(len(KINDS))
    for _ in range(4):
        scenes = _scenes(rng, 16, MIN_DIGITS, MAX_DIGITS, "held_out")
        kept = kept_patches(rng, scenes, patches)
        packed = pack_questions(rng, scenes, recipe.questions_per_image, dict.fromkeys(KINDS, 1.0))
        logits = answer_logits(model, patch_features(model, pixel_values(scenes)), kept, packed)
        labels, kinds = (values[packed.labels != IGNORED] for values in (packed.labels, packed.kind))
        words = labels != WORD_ID[EOS]  # the end is too easy to count
        hits, kinds = (logits.argmax(-1) == labels)[words], kinds[words]
        right += np.bincount(kinds[hits], minlength=len(KINDS))
        total += np.bincount(kinds, minlength=len(KINDS))
    return ", ".join(f"{kind} {share:.2f}" for kind, share in zip(KINDS, right / total, strict=True))
