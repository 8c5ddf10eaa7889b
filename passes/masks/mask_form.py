"""What an attention mask computes, read from the nodes that compute it, not from how they are written.

Every node above a mask is read as a function of its own indices: `arange(n)` is the index itself, indexing with `None`
moves axes, a comparison compares two such functions, an unknown tensor is an unknown function. What comes out for a
mask `[B, H, m, n]` is one formula over batch b, head h, query q and key k, whichever way the model wrote it:

    mask = (arange(n)[None, :] <= arange(n)[:, None]) & padding[:, None, None, :]       k <= q  and  padding(b, k)
    mask = torch.full((n, n), -inf).triu(1)                                            k <= q
    mask = vmap(...)(lambda b, h, q, k: (k <= q) & (k > q - 32))                       k <= q  and  k > q - 32

A mask whose formula is "causal and padding" needs no `[m, n]` tensor: `CanonicalMasks` gives the padding row alone.
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy import And, Ne, Or
from sympy.core.relational import Relational
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.graph import erase_unread, insert_call
from zipvl_compile.passes.graph.op_calls import HidingRowsCall
from zipvl_compile.passes.graph.reading import changed_in_place, example, is_op
from zipvl_compile.passes.masks.index_expr import BATCH, KEY, QUERY, Formula, is_condition
from zipvl_compile.passes.masks.index_rules import formula_of

if TYPE_CHECKING:
    from zipvl_compile.passes.match.attention_site import Attention

log = logging.getLogger("zipvl_compile")
HIDDEN_BELOW = -1e4  # an additive mask hides with -inf or finfo.min; models of old write -10000


class Condition(Enum):
    """What one condition of a mask asks of a key."""

    CAUSAL = "causal"
    PADDING = "padding"
    WINDOW = "sliding window of {}"
    CHUNKS = "chunks of {}"
    PREFIX = "prefix"
    SPANS = "image spans"
    PACKED = "packed sequences"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Part:
    """One condition of a mask; `size` of windows and chunks in tokens, a number or a symbol."""

    condition: Condition
    size: Any = None

    def __str__(self) -> str:
        return self.condition.value.format(self.size)


CAUSAL, PADDING, UNKNOWN = Part(Condition.CAUSAL), Part(Condition.PADDING), Part(Condition.UNKNOWN)
PACKED = Part(Condition.PACKED)


@dataclass(frozen=True)
class MaskForm:
    """What a mask computes.

    Attributes:
        parts: its conditions; empty where every key is visible.
        padding: the `[B or 1, n]` tensor of the padding condition.
        positive: whether padding is `> 0` instead of `!= 0`.
        nodes: the nodes that compute the mask, as far as they were understood.
    """

    parts: tuple[Part, ...]
    padding: Node | None = None
    positive: bool = False
    nodes: tuple[Node, ...] = ()

    @property
    def needs_matrix(self) -> bool:
        """Return whether more than a causal flag and a padding row is needed to apply the mask."""
        return bool(set(self.parts) - {CAUSAL, PADDING})

    @property
    def is_causal(self) -> bool:
        """Return whether it hides later keys."""
        return CAUSAL in self.parts

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts)) or "everything visible"


def read(mask: Node, hides: bool = False) -> MaskForm:
    """Return what `mask [B or 1, H or 1, m or 1, n]` computes; with `hides`, a True hides its key.

    Whatever goes wrong on the way, the mask is unknown, and the operators read it as it is.
    """
    try:
        return _read(mask, hides)
    except Exception as error:
        log.debug("zipvl cannot read the mask %s: %s", mask.format_node(), error)
        return MaskForm((UNKNOWN,))


def _read(mask: Node, hides: bool) -> MaskForm:
    formula = formula_of(mask)
    visible = _visible(formula)
    if visible is None:
        return MaskForm((UNKNOWN,))
    parts: list[Part] = []
    padding: list[tuple[Node, bool]] = []
    for condition in And.make_args(sympy.Not(visible) if hides else visible):
        if condition is sympy.true:
            continue
        row = _padding_row(condition, formula)
        if row is not None:
            padding.append(row)
        part = PADDING if row is not None else _part(condition)
        if part not in parts:
            parts.append(part)
    if len(set(padding)) > 1:
        return MaskForm((*parts, UNKNOWN))
    source, positive = padding[0] if padding else (None, False)
    if source is not None and (not _is_row(source, mask) or changed_in_place(source)):
        return MaskForm((*(part for part in parts if part != PADDING), UNKNOWN))
    return MaskForm(_sorted(parts), source, positive, formula.nodes)


def _visible(formula: Formula) -> sympy.Basic | None:
    """Return the condition under which a key is visible; None where the mask adds anything but "hidden" and 0."""
    value = formula.value
    if is_condition(value):
        return value
    value = sympy.piecewise_fold(value)
    pieces = value.args if isinstance(value, sympy.Piecewise) else ((value, sympy.true),)
    visible, rest = sympy.false, sympy.true
    for number, condition in pieces:
        if not number.is_number or (not (number := float(number)) <= HIDDEN_BELOW and number != 0):
            return None
        if number == 0:
            visible = Or(visible, And(rest, condition))
        rest = And(rest, sympy.Not(condition))
    return sympy.simplify_logic(visible, deep=False) if len(pieces) > 2 else visible


def _at_most_zero(condition: sympy.Basic) -> sympy.Basic | None:
    """Return x where the condition says x <= 0, over integers."""
    if not isinstance(condition, Relational) or isinstance(condition, (sympy.Eq, sympy.Ne)):
        return None
    x = condition.gts * -1 + condition.lts
    return sympy.expand(x + 1 if isinstance(condition, (sympy.Lt, sympy.Gt)) else x)


def _sorted(parts: Any) -> tuple[Part, ...]:
    return tuple(sorted(set(parts), key=str))


def _part(condition: sympy.Basic) -> Part:
    """Return what one condition asks."""
    if isinstance(condition, Or):
        kinds = [_part(arg) for arg in condition.args]
        if CAUSAL not in kinds:
            return UNKNOWN
        prefix = all(kind.condition is Condition.PREFIX for kind in kinds if kind != CAUSAL)
        return Part(Condition.PREFIX if prefix else Condition.SPANS)
    x = _at_most_zero(condition)
    if x is not None:
        if x == KEY - QUERY:
            return CAUSAL
        window = sympy.simplify(x - QUERY + KEY)
        if window.is_number or not window.free_symbols & {BATCH, QUERY, KEY}:
            return Part(Condition.WINDOW, 1 - window)
        return Part(Condition.PREFIX) if KEY in x.free_symbols and QUERY not in x.free_symbols else UNKNOWN
    swapped = condition.subs({QUERY: KEY, KEY: QUERY}, simultaneous=True)
    if isinstance(condition, sympy.Eq) and swapped in (condition, condition.reversed):
        sizes = {f.args[0].as_coefficients_dict().get(KEY, 0) for f in condition.atoms(sympy.floor)} - {0}
        return Part(Condition.CHUNKS, 1 / sizes.pop()) if sizes else Part(Condition.PACKED)
    return UNKNOWN


def _padding_row(condition: sympy.Basic, formula: Formula) -> tuple[Node, bool] | None:
    """Return the tensor behind a condition `row(b, k) != 0` or `row(b, k) > 0`, and whether it is the latter."""
    positive = isinstance(condition, sympy.Gt)
    if not isinstance(condition, (Ne, sympy.Gt)) or condition.rhs != 0:
        return None
    source = formula.tensors.get(getattr(condition.lhs, "func", None))
    if source is None or condition.lhs.args not in ((BATCH, KEY), (0, KEY)):
        return None
    return source, positive


def _is_row(source: Node, mask: Node) -> bool:
    row, whole = example(source), example(mask)
    return row.dim() == 2 and statically_known_true(row.shape[1] == whole.shape[-1])


class CanonicalMasks:
    """Inserts what the masks of one graph need at least, once for all sites that share a mask."""

    def __init__(self) -> None:
        self._forms: dict[tuple[Node, bool], MaskForm] = {}
        self._made: dict[tuple[Node, bool], Node | None] = {}
        self._hiding: dict[Node, Node] = {}

    def form(self, site: Attention) -> MaskForm:
        """Return what the site's mask and causal flag compute together."""
        form = MaskForm(()) if site.mask is None else self._form(site.mask, site.mask_hides)
        return replace(form, parts=_sorted({CAUSAL, *form.parts})) if site.is_causal else form

    def _form(self, mask: Node, hides: bool) -> MaskForm:
        if (mask, hides) not in self._forms:
            self._forms[mask, hides] = read(mask, hides)
        return self._forms[mask, hides]

    def insert(self, site: Attention) -> tuple[Node | None, bool]:
        """Insert the site's mask in the form that the operators read, before the site.

        Returns:
            a mask `[B or 1, Hq or 1, m or 1, n]` or None, True (or 0) where visible, and whether later keys are hidden
            besides. Causal masks, with or without padding, come back as None or the padding row `[B, 1, 1, n]`.
        """
        if site.mask is None:
            return None, site.is_causal
        key = (site.mask, site.mask_hides)
        form = self._form(*key)
        if key not in self._made or changed_in_place(site.mask):  # a mask that is written to differs from site to site
            self._made[key] = _smallest(form, site)
        causal = form.is_causal and not form.needs_matrix
        return self._made[key], site.is_causal or causal

    def hiding(self, site: Attention) -> tuple[Node | None, bool]:
        """Do `insert`, and let a padding row that hides nothing become a mask of 0 samples when the graph runs."""
        rows, is_causal = self.insert(site)
        if rows is None or site.mask is None or self._form(site.mask, site.mask_hides).needs_matrix:
            return rows, is_causal
        if rows not in self._hiding:
            self._hiding[rows] = HidingRowsCall(mask=rows).insert(rows.next)
        return self._hiding[rows], is_causal

    def erase_unread(self) -> None:
        """Erase the nodes of masks that nobody reads any more. Those inside a vmap stay: its calls come in pairs."""
        for form in self._forms.values():
            if not any(is_op(node, "add_batch_dim") for node in form.nodes):
                erase_unread(sorted(form.nodes, reverse=True))


def _smallest(form: MaskForm, site: Attention) -> Node | None:
    assert site.mask is not None
    if form.needs_matrix:
        return four_axes(site.mask, site.node, site.mask_hides)
    if form.padding is None:
        return None
    before = form.padding.next  # early: hiding_rows makes the host wait for it, so nothing else should come first
    while before.op == "placeholder":
        before = before.next
    row = insert_call(before, torch.gt if form.positive else torch.ne, (form.padding, 0))
    return insert_call(before, operator.getitem, (row, (slice(None), None, None, slice(None))))


def four_axes(mask: Node, before: Node, hides: bool) -> Node:
    """Return `mask` as `[B or 1, H or 1, m or 1, n]`, True where visible."""
    if hides:
        mask = insert_call(before, torch.logical_not, (mask,))
    missing = 4 - example(mask).dim()
    return insert_call(before, operator.getitem, (mask, (*[None] * missing, Ellipsis))) if missing else mask
