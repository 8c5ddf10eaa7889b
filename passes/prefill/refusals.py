"""Why an attention of a prefill stays dense."""

from __future__ import annotations

import dataclasses
import math
import re

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes import skip_layers
from zipvl_compile.passes.cost_model import NEVER
from zipvl_compile.passes.graph.reading import changed_in_place, example
from zipvl_compile.passes.masks.mask_form import MaskForm
from zipvl_compile.passes.match import cache_layers, reasons
from zipvl_compile.passes.match.attention_site import Attention, AttentionShape, mask_fits
from zipvl_compile.passes.match.cross_attention import is_cross_attention
from zipvl_compile.passes.match.reasons import Reason, Why
from zipvl_compile.passes.match.sites import Sites
from zipvl_compile.passes.settings import Settings

READ_AGAIN = Reason(Why.CACHE_READ_AGAIN, "the layer's cache is read again in the same graph")
CHANGED = Reason(Why.CHANGED_IN_PLACE, "keys or values are changed in place")
NOT_CAUSAL = Reason(
    Why.NOT_CAUSAL,
    "no causal mask: its tokens see all others, as in an encoder; transformers makes no mask for "
    "attn_implementation='paged|eager' outside of continuous batching: load the model with 'sdpa'",
)
ONE_TOKEN = Reason(Why.ONE_TOKEN, "prompt of one token")
NO_GAIN = Reason(Why.NO_GAIN, "keeping every token gains nothing over dense attention", NEVER)
KEPT_WHOLE = Reason(Why.FULL_CACHE, "a later part of a prompt, of which the options drop nothing")
FIRST_IS_DENSE = Reason(Why.SHARED_KV, "shared KV: the first attention over this layer's cache stays dense")
LATENT_CODES = Reason(Why.LATENT_CACHE, "evict='quantize' over a cache of latents: use evict='host', or 'drop'")
TWO_LAYERS = Reason(Why.SHARED_KV, "shared KV: this attention reads the keys and values of two cache layers")


def refusal(attention: Attention, layer: Node, settings: Settings) -> Reason | None:
    """Return why an attention must stay dense and its cache whole, or None."""
    if statically_known_true(example(attention.key).shape[2] == 1):
        return ONE_TOKEN
    cached = attention.key in cache_layers.stored_by(layer)  # else it is computed from the cache's latents
    if settings.evict == "quantize" and (uncoded := _uncoded(attention, cached, settings)) is not None:
        return uncoded
    if cached and any(changed_in_place(x) for x in (attention.key, attention.value)):
        return CHANGED
    if not cache_layers.only_cached(layer):
        return READ_AGAIN
    if is_cross_attention(attention):
        return reasons.CROSS_ATTENTION
    if not attention.reads_whole_prompt and (part := part_refusal(attention, settings)) is not None:
        return part
    if unreadable := unreadable_inputs(attention):
        return unreadable
    return NOT_CAUSAL if attention.mask is None and not attention.is_causal else None


def _uncoded(attention: Attention, cached: bool, settings: Settings) -> Reason | None:
    """Return why the tokens that are not kept cannot be held at few bits, or None."""
    if not cached:
        return LATENT_CODES
    widths, per_byte = {example(x).shape[3] for x in (attention.key, attention.value)}, 8 // settings.evict_bits
    uneven = next((width for width in widths if width % per_byte), None)
    text = f"evict_bits={settings.evict_bits} and a head_dim of {uneven}, which {per_byte} does not divide"
    return None if uneven is None else Reason(Why.HEAD_DIM, text)


def part_refusal(attention: Attention, settings: Settings) -> Reason | None:
    """Return why nothing is dropped of a cache that holds every token once a later part has attended to it, or None."""
    m, n = example(attention.query).shape[2], example(attention.key).shape[2]
    if settings.keeps_all or settings.evict == "keep":
        return KEPT_WHOLE
    if not attention.is_later_part:
        return Reason(Why.PART_OF_PROMPT, f"{m} queries over {n} keys: not the prefill of a whole prompt")
    if settings.groups != "layer" or settings.reselect_tokens == 0 or m < settings.reselect_tokens:
        return reasons.LATER_PART
    return reasons.MISALIGNED_CAUSAL if attention.is_causal else None


def unreadable_inputs(attention: Attention) -> Reason | None:
    """Return why the operators cannot read an attention's inputs, or None."""
    q, k = example(attention.query), example(attention.key)
    if attention.dropout:
        return reasons.dropout(attention.dropout)
    if not statically_known_true(q.shape[0] == k.shape[0]):
        return Reason(Why.BATCH, f"batch {q.shape[0]} of queries over batch {k.shape[0]} of keys")
    if attention.mask is not None and not mask_fits(attention):
        return reasons.mask_shape(list(example(attention.mask).shape))
    return None


def reader_refusal(attention: Attention, owner: Attention) -> Reason | None:
    """Return why a further attention over the same keys and values must stay dense, or None."""
    if (attention.key, attention.value) != (owner.key, owner.value):
        return TWO_LAYERS
    if attention.is_causal and not attention.reads_whole_prompt:
        return reasons.MISALIGNED_CAUSAL
    return unreadable_inputs(attention)


def too_short(attention: Attention, shape: AttentionShape, settings: Settings) -> Reason | None:
    """Return that the prompt is too short to gain, or None.

    `n >= min_tokens` becomes a guard of the compiled graph: a shorter prompt compiles once, dense.
    """
    query, n, least = example(attention.query), example(attention.key).shape[2], settings.min_tokens
    if callable(least):
        least = least(shape, query.dtype, query.device)
    if least >= NEVER:
        return NO_GAIN
    return None if n >= least else Reason(Why.SHORT_PROMPT, f"prompt shorter than min_tokens={least}", least)


def shape_of(attention: Attention, form: MaskForm, settings: Settings, shared: bool) -> AttentionShape:
    """Return what the cost of an attention depends on; a batch of symbolic size counts as one sample.

    `shared`: other ranks have others of its heads.
    """
    q, k, v = (example(x) for x in (attention.query, attention.key, attention.value))
    batch = q.shape[0] if isinstance(q.shape[0], int) else 1
    sizes = (batch, q.shape[1], k.shape[1], q.shape[3], v.shape[3], settings.probes, q.element_size())
    masked = attention.mask is not None
    local = settings.window + settings.sinks if settings.local else 0
    work = skip_layers.work(attention.node) if settings.skip == "layer" else 0
    every, matrix = settings.queries == "all", masked and form.needs_matrix
    dense_from = settings.dense_from if every and local and not matrix and settings.dense_from < 1 else math.inf
    return AttentionShape(*sizes, every, masked, matrix, local, work, dense_from, shared)


def numbers_of(sites: Sites) -> tuple[int, ...]:
    """Return which layers the prefill sites of a graph are of, and then its decode sites: a row of its budgets each."""
    return tuple(number_of(site.name, i) for kind in (sites.prefill, sites.decode) for i, site in enumerate(kind))


def number_of(name: str, place: int) -> int:
    """Return which layer of its model a module path is of: 3 for `language_model.layers.3.self_attn`.

    `place`, among the attentions of the graph, stands for the number of a path that has none.
    """
    number = re.search(r"\.(?:layers?|h|blocks?)\.(\d+)(?=\.|$)", f".{name}") or re.search(r"\.(\d+)(?=\.|$)", name)
    return int(number[1]) if number else place


def left_alone(number: int, settings: Settings) -> Reason | None:
    """Return that a layer is one of those that keep every token, or None."""
    dense = settings.dense_layers
    if number not in (dense if isinstance(dense, tuple) else range(int(dense))):
        return None
    which = "the layers" if isinstance(dense, tuple) else "the first layers"
    return Reason(Why.DENSE_LAYER, f"one of {which} that keep every token: dense_layers={dense}")


def with_counted_layers(settings: Settings, numbers: tuple[int, ...]) -> Settings:
    """Return settings without fractions of layers; `numbers` are those of the layers of a graph.

    After graph breaks between its layers a graph holds few of them, and the frames that call it know how many it has.
    """
    dense, skip_in = settings.dense_layers, settings.skip_in
    if not isinstance(dense, float) and not isinstance(skip_in, float):
        return settings
    layers = max(settings.decoder_layers() or 0, max(numbers, default=-1) + 1)

    def first(fraction: float) -> int:
        return math.ceil(round(fraction * layers, 9))

    return dataclasses.replace(
        settings,
        dense_layers=first(dense) if isinstance(dense, float) else dense,
        skip_in=tuple(range(first(skip_in), layers)) if isinstance(skip_in, float) else skip_in,
    )
