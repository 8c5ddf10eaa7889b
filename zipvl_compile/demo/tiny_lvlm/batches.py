"""Training batches: scenes with their patch labels, and many questions packed behind each image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from zipvl_compile.demo.tiny_lvlm.build import normalise, word_ids
from zipvl_compile.demo.tiny_lvlm.questions import EOS, KINDS, PAD, ask, hints
from zipvl_compile.demo.tiny_lvlm.scenes import COLOUR_NAMES, Layout, Scene, draw_patches

IGNORED = -100
NO_DIGIT = 10
NO_COLOUR = len(COLOUR_NAMES)


def pixel_values(scenes: Sequence[Scene]) -> torch.Tensor:
    """Float32 (batch, 3, height, width), normalised as the processor does."""
    return normalise(torch.from_numpy(np.stack([scene.image for scene in scenes])))


def patch_values(rng: np.random.Generator, layouts: Sequence[Layout], kept: torch.Tensor) -> torch.Tensor:
    """Float32 (batch, n, 3, CELL, CELL), drawn and normalised: the patches ``kept``, (batch, n), of each scene."""
    drawn = [draw_patches(rng, layout, patches) for layout, patches in zip(layouts, kept.numpy(), strict=True)]
    return normalise(torch.from_numpy(np.stack(drawn)))


def patch_labels(scenes: Sequence[Scene | Layout]) -> tuple[torch.Tensor, torch.Tensor]:
    """Digit and colour numbers, int64 (batch, patches); NO_DIGIT and NO_COLOUR on the background."""
    canvas = scenes[0].canvas
    digits = torch.full((len(scenes), canvas.tokens), NO_DIGIT)
    colours = torch.full((len(scenes), canvas.tokens), NO_COLOUR)
    for index, scene in enumerate(scenes):
        for one in scene.digits:
            digits[index, one.row * canvas.grid + one.column] = one.digit
            colours[index, one.row * canvas.grid + one.column] = COLOUR_NAMES.index(one.colour)
    return digits, colours


def kept_patches(rng: np.random.Generator, scenes: Sequence[Scene | Layout], count: int) -> torch.Tensor:
    """Every patch with a digit and random others: ascending patch numbers, int64 (batch, count)."""
    digits, _ = patch_labels(scenes)
    rank = torch.from_numpy(rng.random(digits.shape)) + 10 * (digits != NO_DIGIT)
    return rank.topk(count, dim=1).indices.sort(dim=1).values


def log_weights(scenes: Sequence[Scene | Layout], kept: torch.Tensor) -> torch.Tensor:
    """How many patches each of ``kept`` stands for, as a logarithm to add to its attention scores: float32 (batch, n).

    A digit stands for itself, the background in the sequence for all of it: so attention to a few hundred patches
    spreads as it would over the whole picture.
    """
    there = patch_labels(scenes)[0] != NO_DIGIT
    of_kept = there.gather(1, kept)
    all_background, background = (~there).sum(1), (~of_kept).sum(1)
    return torch.where(of_kept, 0.0, (all_background / background).log()[:, None])


@dataclass(frozen=True)
class PackedQuestions:
    """Several independent questions per image, one after the other in one row; all tensors (batch, length).

    ids: int64 words.  labels: int64, the word to predict next, IGNORED outside answers.  positions: int64,
    counted from the end of the image for every question anew.  group: int64, number of the question, -1 on
    padding.  kind: int64 index into KINDS, -1 on padding.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    group: torch.Tensor
    kind: torch.Tensor


def pack_questions(
    rng: np.random.Generator,
    scenes: Sequence[Scene | Layout],
    per_image: int,
    weights: Mapping[str, float],
    with_hints: bool = False,
) -> PackedQuestions:
    """Draw ``per_image`` questions for every scene, kinds in proportion to ``weights``.

    ``with_hints`` also labels the word of a prompt that its answer turns on with that answer.
    """
    kinds, ids = list(weights), word_ids(scenes[0].canvas)
    chances = np.array(list(weights.values())) / sum(weights.values())
    rows: list[list[tuple[int, ...]]] = []
    for scene in scenes:
        row: list[tuple[int, ...]] = []
        for number in range(per_image):
            question = ask(rng, scene.digits, kinds[int(rng.choice(len(kinds), p=chances))])
            prompt = [ids[word] for word in question.prompt.split()]
            answer = [ids[word] for word in f"{question.answer} {EOS}".split()]
            words = prompt + answer[:-1]
            targets = [IGNORED] * (len(prompt) - 1) + answer
            if with_hints:
                for index, word in hints(question).items():
                    targets[index] = ids[word]
            kind = KINDS.index(question.kind)
            row += (
                (word, target, offset, number, kind)
                for offset, (word, target) in enumerate(zip(words, targets, strict=True))
            )
        rows.append(row)
    length = max(map(len, rows))
    padding = (ids[PAD], IGNORED, 0, -1, -1)
    table = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    return PackedQuestions(*table.unbind(-1))


def packed_mask(group: torch.Tensor, prefix: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Who may attend to whom, bool (batch, 1, prefix + length, prefix + length).

    The prefix (``<bos>`` and patches) is causal; a question sees the prefix and itself, no other question.  With
    ``weights`` of the patches (see ``log_weights``) it is what to add to the scores, float32.
    """
    batch, length = group.shape
    total = prefix + length
    mask = torch.zeros(batch, 1, total, total, dtype=torch.bool)
    mask[:, :, :, :prefix] = True
    mask[:, 0, prefix:, prefix:] = group[:, :, None] == group[:, None, :]
    mask &= torch.ones(total, total, dtype=torch.bool).tril()
    if weights is None:
        return mask
    columns = F.pad(weights, (1, length))[:, None, None]  # <bos> before the patches
    return columns.expand(mask.shape).masked_fill(~mask, float("-inf"))
