"""The charts below the panels: the kept share of every layer as bars, and single tokens as strips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from zipvl_compile.demo.layout import Layout
from zipvl_compile.demo.plot_parts import DROPPED, LINES, MARGIN, WIDTH, place, shares, write

# Okabe and Ito's colours, which colour-blind people tell apart.
ALL, VISUAL, TEXT = "#333333", "#E69F00", "#0072B2"
MOST_WORDS = 64  # that are written below their strip
LABELS, LETTER = 2.0, 0.085  # inches: left of a strip, and of a letter of the words below it


class Bars:
    """The kept share of every layer: of the whole prompt, of its images and of its text."""

    height = 2.75

    def __init__(self, layout: Layout, layers: Sequence[torch.Tensor | None], kinds: Sequence[str]) -> None:
        self.layers, self.kinds = layers, kinds
        everything = torch.arange(layout.length)
        kinds_of_tokens = [("all prompt tokens", ALL, everything), ("image and video tokens", VISUAL, layout.visual)]
        kinds_of_tokens.append(("text tokens", TEXT, layout.text))
        self.groups = [one for one in kinds_of_tokens if one[2].numel()]

    def draw(self, figure: Figure, top: float) -> None:
        write(
            figure, MARGIN, top + 0.04, "share of the tokens that each layer keeps in its KV cache", 10, weight="bold"
        )
        axes = place(figure, 0.75, top + 0.55, WIDTH - 0.75 - MARGIN, self.height - 1.15)
        axes.set_label("kept share")
        count = len(self.layers)
        width = 0.8 / len(self.groups)
        for i, (name, colour, tokens) in enumerate(self.groups):
            at = [n for n, kept in enumerate(self.layers) if kept is not None]
            heights = [100 * shares(kept, tokens).mean() for kept in self.layers if kept is not None]
            middles = [n + (i - (len(self.groups) - 1) / 2) * width for n in at]
            label = f"{name} ({tokens.numel():,})"
            bars = axes.bar(middles, heights, width * 0.94, color=colour, label=label)
            if count <= 8 or (i == 0 and count <= 16):
                axes.bar_label(bars, [f"{height:.0f}%" for height in heights], fontsize=8, padding=1)
        for n, kept in enumerate(self.layers):
            if kept is None:
                kind = self.kinds[n] if n < len(self.kinds) else "of another kind"
                axes.text(n, 3, kind, rotation=90, ha="center", va="bottom", fontsize=8, color=LINES)
        axes.set_ylim(0, 112)
        axes.set_xlim(-0.6, count - 0.4)
        axes.set_yticks([0, 25, 50, 75, 100], ["0%", "25%", "50%", "75%", "100%"], fontsize=8)
        step = math.ceil(count / 40)
        axes.set_xticks(range(0, count, step), [str(n) for n in range(0, count, step)], fontsize=8)
        axes.set_xlabel("decoder layer", fontsize=9)
        axes.set_ylabel("kept (% of tokens)", fontsize=9)
        axes.grid(axis="y", linewidth=0.4, color="#CCCCCC")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=3, fontsize=9, frameon=False, borderaxespad=0.1)


class Strip:
    """One row for every layer, one column for every token of a kind: in colour where the layer keeps it."""

    def __init__(
        self, title: str, tokens: torch.Tensor, words: Sequence[str], layers: Mapping[int, torch.Tensor], colour: str
    ) -> None:
        self.title, self.tokens, self.layers, self.colour = title, tokens, layers, colour
        self.words = [word if len(word) <= 14 else word[:13] + "\u2026" for word in words[: MOST_WORDS + 1]]
        self.written = 0 < len(self.words) <= MOST_WORDS
        self.rows = min(0.2 * len(layers), 3.5)
        longest = LETTER * max(map(len, self.words), default=0)
        self.upright = longest > 0.9 * (WIDTH - LABELS - MARGIN) / max(1, len(self.words))
        below = 0.55 if not self.written else 0.25 + (longest if self.upright else LETTER)
        self.height = 0.4 + self.rows + below

    def draw(self, figure: Figure, top: float) -> None:
        write(figure, MARGIN, top + 0.04, self.title, 10, weight="bold")
        axes = place(figure, LABELS, top + 0.32, WIDTH - LABELS - MARGIN, self.rows)
        axes.set_label(self.title)
        kept = np.stack([shares(positions, self.tokens) for positions in self.layers.values()])
        axes.imshow(kept, aspect="auto", cmap=_fading(self.colour), vmin=0, vmax=1)
        step = math.ceil(len(self.layers) / max(1, int(self.rows / 0.17)))
        said = [
            f"layer {n}: {row.sum():.0f} of {row.size} ({row.mean():.0%})"
            for n, row in zip(self.layers, kept, strict=True)
        ]
        axes.set_yticks(range(0, len(said), step), said[::step], fontsize=8)
        axes.set_yticks(np.arange(0.5, len(said) - 1), minor=True)
        axes.grid(which="minor", axis="y", color="white", linewidth=1.5)
        if self.written:
            axes.set_xticks(np.arange(0.5, len(self.words) - 1), minor=True)
            axes.grid(which="minor", axis="x", color="white", linewidth=1.0)
            axes.set_xticks(range(len(self.words)), self.words, rotation=90 if self.upright else 0, fontsize=8)
            for label in axes.get_xticklabels():
                label.set_parse_math(False)
        else:
            axes.set_xlabel(f"the {self.tokens.numel():,} tokens, in the order of the prompt", fontsize=9)
            axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)


def _fading(colour: str) -> ListedColormap:
    """Return a colour map from the pale grey of what is dropped to a colour."""
    low, high = (np.array([int(one[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for one in (DROPPED, colour))
    return ListedColormap(np.linspace(low, high, 64))
