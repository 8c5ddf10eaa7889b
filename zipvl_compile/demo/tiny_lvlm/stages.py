"""The stages of training and the recipe they follow; what they are for is told in ``train``."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from zipvl_compile.demo.tiny_lvlm.batches import (
    IGNORED,
    NO_DIGIT,
    PackedQuestions,
    kept_patches,
    log_weights,
    pack_questions,
    packed_mask,
    patch_labels,
    patch_values,
    pixel_values,
)
from zipvl_compile.demo.tiny_lvlm.build import word_ids
from zipvl_compile.demo.tiny_lvlm.optimizer import Optimizer
from zipvl_compile.demo.tiny_lvlm.questions import DIGIT_WORDS, EOS, KINDS, NOTHING
from zipvl_compile.demo.tiny_lvlm.recipe import Recipe
from zipvl_compile.demo.tiny_lvlm.resting import watching
from zipvl_compile.demo.tiny_lvlm.scenes import (
    COLOUR_NAMES,
    MAX_DIGITS,
    MIN_DIGITS,
    Layout,
    Scene,
    Split,
    draw_layout,
    draw_scene,
)


def patch_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Image tokens as the language model gets them: float32 (batch, n, hidden).

    pixels: of whole pictures, (batch, 3, height, width), all of which the vision tower sees; or of the kept patches
    alone, (batch, n, 3, CELL, CELL).  kept: which patches, (batch, n), ascending.
    """
    tower = model.model.vision_tower
    if pixels.dim() == 4:
        every = tower(pixels).last_hidden_state[:, 1:]
        seen = every.gather(1, kept[:, :, None].expand(-1, -1, every.shape[-1]))
    else:
        embeddings = tower.embeddings
        weight = embeddings.patch_embedding.weight  # of a convolution that takes each patch once
        patches = F.linear(pixels.flatten(2), weight.flatten(1)) + embeddings.position_embedding(1 + kept)
        first = embeddings.class_embedding + embeddings.position_embedding.weight[0]
        patches = torch.cat([first.expand(len(kept), 1, -1), patches], dim=1)
        seen = tower.encoder(inputs_embeds=tower.pre_layrnorm(patches)).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(seen)


def _pictures(recipe: Recipe, rng: np.random.Generator, scenes: list, kept: torch.Tensor) -> torch.Tensor:
    return pixel_values(scenes) if recipe.vision_sees_all else patch_values(rng, scenes, kept)


def answer_logits(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,
    kept: torch.Tensor,
    packed: PackedQuestions,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits at the places that have a label, float32 (answer words of the whole batch, vocabulary).

    features: of the patches in the sequence, (batch, n, hidden).  kept: which ones, (batch, n), ascending.
    weights: see ``log_weights``.
    """
    words = model.get_input_embeddings()(packed.ids)
    start = model.get_input_embeddings()(torch.full((len(kept), 1), model.config.get_text_config().bos_token_id))
    prefix, tokens = 1 + kept.shape[1], model.config.image_seq_length
    positions = torch.cat([torch.zeros_like(kept[:, :1]), 1 + kept, 1 + tokens + packed.positions], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([start, features, words], dim=1),
        attention_mask=packed_mask(packed.group, prefix, weights),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state[:, prefix:]
    return model.lm_head(hidden[packed.labels != IGNORED])


def align(model: LlavaForConditionalGeneration, recipe: Recipe) -> Iterator[str | None]:
    """Stage ``align``.  Like every stage it yields once per step: a line to print, or None."""
    rng, canvas = np.random.default_rng([recipe.seed, 0]), recipe.canvas
    table = model.get_input_embeddings().get_parameter("weight").detach()
    table = table / math.sqrt(table.shape[1])
    words = {
        "digit": (*DIGIT_WORDS, NOTHING),
        "colour": (*COLOUR_NAMES, NOTHING),
        "row": canvas.rows,
        "column": canvas.columns,
    }
    ids = word_ids(canvas)
    codes = {name: table[[ids[word] for word in group]] for name, group in words.items()}
    optimizer = Optimizer(_vision_parts(model, recipe.align_lr), 0.01, recipe.muon, betas=(0.9, 0.999))
    for step in range(recipe.align_steps):
        optimizer.set_rate(step, recipe.align_steps, warmup=50)
        scenes = _scenes(recipe, rng, recipe.align_batch, MIN_DIGITS, recipe.align_max_digits)
        kept = _all_patches(scenes)
        if recipe.align_patches is not None:
            kept = kept_patches(rng, scenes, recipe.align_patches)
        digits, colours = (labels.gather(1, kept) for labels in patch_labels(scenes))
        targets = {"digit": digits, "colour": colours, "row": kept // canvas.grid, "column": kept % canvas.grid}
        # Background is nearly everywhere and easy: it must not drown the digits.
        weight = torch.where(digits == NO_DIGIT, 0.05, 1.0).flatten()
        features = patch_features(model, _pictures(recipe, rng, scenes, kept), kept)
        loss = 1e-3 * features.square().mean()
        for name, target in targets.items():
            logits = features @ codes[name].T
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            loss = loss + (each * weight).sum() / weight.sum()
        optimizer.update(loss)
        reports = _is_report(step, recipe.align_steps, every=100)
        yield f"loss {loss.item():.3f}, {_patch_accuracy(model, recipe, codes)}" if reports else None


def compact(model: LlavaForConditionalGeneration, recipe: Recipe) -> Iterator[str | None]:
    """Stage ``compact``: the scenes grow from one digit to full size, then the background grows."""
    rng = np.random.default_rng([recipe.seed, 1])
    optimizer = Optimizer(_language_parts(model, recipe.compact_lr), recipe.weight_decay, recipe.muon)
    steps, (fewest, most) = recipe.compact_steps, recipe.compact_patches
    for step in range(steps):
        optimizer.set_rate(step, steps, warmup=100)
        growth = min(1.0, step / (0.3 * steps))
        high = 2 + int((MAX_DIGITS - 2) * growth)
        scenes = _scenes(recipe, rng, recipe.compact_batch, MIN_DIGITS if growth == 1 else 1, high)
        spread = max(0.0, step / steps - 0.3) / 0.7
        kept = kept_patches(rng, scenes, fewest + int((most - fewest) * spread))
        packed = pack_questions(rng, scenes, recipe.questions_per_image, recipe.question_weights, with_hints=True)
        with torch.no_grad():
            features = patch_features(model, _pictures(recipe, rng, scenes, kept), kept)
        line = _answer_step(model, optimizer, features, kept, packed, recipe.compact_rest, rng)
        reports = _is_report(step, steps, every=250)
        yield f"{line}, {_packed_accuracy(model, recipe, kept.shape[1])}" if reports else None


def full(model: LlavaForConditionalGeneration, recipe: Recipe) -> Iterator[str | None]:
    """Stage ``full``: all weights, whole images or most of them."""
    return _whole_model(model, recipe, "full", 2, recipe.question_weights)


def polish(model: LlavaForConditionalGeneration, recipe: Recipe) -> Iterator[str | None]:
    """Stage ``polish``: as ``full``, at a smaller rate and with more of the questions that are still weak."""
    return _whole_model(model, recipe, "polish", 3, recipe.polish_weights)


STAGES: dict[str, Callable[[LlavaForConditionalGeneration, Recipe], Iterator[str | None]]] = {
    "align": align,
    "compact": compact,
    "full": full,
    "polish": polish,
}


def _whole_model(
    model: LlavaForConditionalGeneration,
    recipe: Recipe,
    stage: str,
    number: int,
    weights: dict[str, float],
) -> Iterator[str | None]:
    rng = np.random.default_rng([recipe.seed, number])
    steps, batch, rate, patches, whole, rest, weighs = (
        getattr(recipe, f"{stage}_{name}") for name in ("steps", "batch", "lr", "patches", "whole", "rest", "weighs")
    )
    parts = _language_parts(model, rate) + _vision_parts(model, rate * recipe.full_vision_share)
    optimizer = Optimizer(parts, recipe.weight_decay, recipe.muon)
    for step in range(steps):
        optimizer.set_rate(step, steps, warmup=min(50, max(steps // 8, 1)))
        scenes = _scenes(recipe, rng, batch, MIN_DIGITS, MAX_DIGITS)
        of_all = int((step + 1) * whole) > int(step * whole)
        kept = kept_patches(rng, scenes, recipe.canvas.tokens if of_all else int(rng.integers(*patches)))
        packed = pack_questions(rng, scenes, recipe.questions_per_image, weights, with_hints=True)
        features = patch_features(model, _pictures(recipe, rng, scenes, kept), kept)
        many = log_weights(scenes, kept) if weighs else None
        line = _answer_step(model, optimizer, features, kept, packed, rest, rng, many)
        reports = _is_report(step, steps, every=min(250, max(steps // 4, 1)))
        yield f"{line}, {_packed_accuracy(model, recipe, patches[1])}" if reports else None


def _answer_step(
    model: LlavaForConditionalGeneration,
    optimizer: Optimizer,
    features: torch.Tensor,
    kept: torch.Tensor,
    packed: PackedQuestions,
    rest: tuple[float, float, float],
    rng: np.random.Generator,
    weights: torch.Tensor | None = None,
) -> str:
    labels = packed.labels[packed.labels != IGNORED]
    if any(rest):
        prefix = 1 + kept.shape[1]
        with watching(model, rng, prefix, prefix + packed.ids.shape[1]) as watched:
            logits = answer_logits(model, features, kept, packed, weights)
        loss = F.cross_entropy(logits, labels)
        added, said = watched.loss(*rest), f", {watched}"
    else:
        logits, said = answer_logits(model, features, kept, packed, weights), ""
        loss = F.cross_entropy(logits, labels)
        added = torch.zeros_like(loss)
    optimizer.update(loss + added)
    return f"loss {loss.item():.3f}, right {(logits.argmax(-1) == labels).float().mean():.3f}{said}"


def _language_parts(model: LlavaForConditionalGeneration, rate: float) -> list[tuple[torch.nn.Module, float]]:
    return [(model.model.language_model, rate), (model.lm_head, rate)]


def _vision_parts(model: LlavaForConditionalGeneration, rate: float) -> list[tuple[torch.nn.Module, float]]:
    return [(model.model.vision_tower, rate), (model.model.multi_modal_projector, rate)]


def _scenes(
    recipe: Recipe, rng: np.random.Generator, count: int, low: int, high: int, split: Split = "train"
) -> list[Any]:
    """Scenes, or only their layouts where patches are drawn one by one."""
    draw: Callable[..., Scene | Layout] = draw_scene if recipe.vision_sees_all else draw_layout
    return [draw(rng, split, low, high, recipe.canvas) for _ in range(count)]


def _all_patches(scenes: list[Any]) -> torch.Tensor:
    return torch.arange(scenes[0].canvas.tokens).expand(len(scenes), -1)


def _is_report(step: int, steps: int, every: int) -> bool:
    return (step + 1) % every == 0 or step + 1 == steps


@torch.no_grad()
def _patch_accuracy(model: LlavaForConditionalGeneration, recipe: Recipe, codes: dict[str, torch.Tensor]) -> str:
    """On how many digits the patch says the right word with a probability above one half."""
    rng, grid = np.random.default_rng(5), recipe.canvas.grid
    scenes = _scenes(recipe, rng, 32, 16, 16, recipe.report_split)
    kept = kept_patches(rng, scenes, recipe.align_patches or recipe.canvas.tokens)
    digits, colours = (labels.gather(1, kept) for labels in patch_labels(scenes))
    there = digits != NO_DIGIT
    features = patch_features(model, _pictures(recipe, rng, scenes, kept), kept)[there]
    truths = {
        "digit": digits[there],
        "colour": colours[there],
        "row": kept[there] // grid,
        "column": kept[there] % grid,
    }
    lines = []
    for name, truth in truths.items():
        chance = (features @ codes[name].T).softmax(-1).gather(-1, truth[:, None])
        lines.append(f"{name} {(chance > 0.5).float().mean():.3f}")
    return f"{_said(recipe)} {', '.join(lines)}"


def _said(recipe: Recipe) -> str:
    return recipe.report_split.replace("_", " ")


@torch.no_grad()
def _packed_accuracy(model: LlavaForConditionalGeneration, recipe: Recipe, patches: int) -> str:
    """Share of rightly predicted answer words per kind (previous words given)."""
    rng = np.random.default_rng(123)
    right, total = np.zeros(len(KINDS)), np.zeros(len(KINDS))
    for _ in range(4):
        scenes = _scenes(recipe, rng, 16 if patches < 1024 else 2, MIN_DIGITS, MAX_DIGITS, recipe.report_split)
        kept = kept_patches(rng, scenes, patches)
        packed = pack_questions(rng, scenes, recipe.questions_per_image, dict.fromkeys(KINDS, 1.0))
        features = patch_features(model, _pictures(recipe, rng, scenes, kept), kept)
        logits = answer_logits(model, features, kept, packed)
        labels, kinds = (values[packed.labels != IGNORED] for values in (packed.labels, packed.kind))
        words = labels != word_ids(recipe.canvas)[EOS]  # the end is too easy to count
        hits, kinds = (logits.argmax(-1) == labels)[words], kinds[words]
        right += np.bincount(kinds[hits], minlength=len(KINDS))
        total += np.bincount(kinds, minlength=len(KINDS))
    shares = ", ".join(f"{kind} {share:.2f}" for kind, share in zip(KINDS, right / np.maximum(total, 1), strict=True))
    return f"{_said(recipe)} {shares}"
