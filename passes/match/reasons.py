"""Why an attention stays as it is: a value to decide by, and a text to read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from zipvl_compile.passes.match.attention_site import PART_TOKENS


class Why(Enum):
    """The kinds of reasons; those of `BY_DESIGN` say that staying dense is what should happen."""

    ONE_TOKEN = auto()
    SHORT_PROMPT = auto()
    NO_GAIN = auto()
    DENSE_LAYER = auto()
    CROSS_ATTENTION = auto()
    ENCODER = auto()
    NO_CACHE = auto()
    SLIDING_WINDOW = auto()
    FLEX_ATTENTION = auto()
    CHANGED_IN_PLACE = auto()
    CACHE_READ_AGAIN = auto()
    PART_OF_PROMPT = auto()
    NOT_CAUSAL = auto()
    MISALIGNED_CAUSAL = auto()
    DROPOUT = auto()
    BATCH = auto()
    MASK_SHAPE = auto()
    SHARED_KV = auto()
    TWO_LAYERS = auto()
    NOT_CACHED = auto()
    FULL_CACHE = auto()
    STATIC_CACHE = auto()
    FOREIGN_CACHE = auto()
    OTHER_CACHE = auto()
    OTHER_GRAPH = auto()
    OTHER_LAYER = auto()
    LATENT_CACHE = auto()
    HEAD_DIM = auto()
    NOT_RECOGNISED = auto()
    GRADIENTS = auto()
    RANKS = auto()
    FAULT = auto()


BY_DESIGN = frozenset({
    Why.ONE_TOKEN, Why.SHORT_PROMPT, Why.NO_GAIN, Why.DENSE_LAYER, Why.CROSS_ATTENTION, Why.ENCODER, Why.NO_CACHE,
    Why.SLIDING_WINDOW, Why.FLEX_ATTENTION, Why.FULL_CACHE,
})  # fmt: skip


@dataclass(frozen=True)
class Reason:
    """Why one attention stays as it is.

    Attributes:
        why: the kind.
        text: one sentence without its full stop, for people.
        min_tokens: from which prompt length it would not (tokens), where that is the reason.
    """

    why: Why
    text: str
    min_tokens: int | None = None

    @property
    def by_design(self) -> bool:
        """Return whether staying dense is what should happen, so that nobody needs a warning."""
        return self.why in BY_DESIGN

    def __str__(self) -> str:
        return self.text


CROSS_ATTENTION = Reason(Why.CROSS_ATTENTION, "cross-attention: queries and keys come from different hidden states")
MISALIGNED_CAUSAL = Reason(Why.MISALIGNED_CAUSAL, "is_causal aligns queries with the first keys, not with the last")


_KEPT = (
    "a later part of a prompt, over a cache that holds the earlier one: its queries attend to every cached token, and "
    "none of its tokens is dropped"
)
LATER_PART = Reason(
    Why.PART_OF_PROMPT,
    f"{_KEPT}: options={{'reselect_tokens': {PART_TOKENS}}} selects parts of so many tokens or more anew, together "
    "with what is in memory",
)
LATER_PART_ELSEWHERE = Reason(Why.PART_OF_PROMPT, f"{_KEPT}, since it is no cache layer of this package")


def fault(error: Exception) -> Reason:
    """Return the reason for an error of ours, which must not break the user's compile."""
    text = " ".join(str(error).split())[:200]
    return Reason(Why.FAULT, f"zipvl failed on it ({type(error).__name__}: {text}): please report this")


def dropout(p: Any) -> Reason:
    number = f" {p}" if isinstance(p, float) else ""  # a symbol says nothing to people
    return Reason(Why.DROPOUT, f"attention dropout{number}: the model is training")


def mask_shape(shape: list) -> Reason:
    return Reason(Why.MASK_SHAPE, f"mask of shape {shape} is not [batch, heads, queries, keys]")
