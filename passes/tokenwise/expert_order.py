"""Which operations belong to a mixture of experts that sorts its tokens by expert, and that they treat each by itself.

    ids [n, K] ─ flat ─ sort ─┬─ order ─ // K ── x[..] ──┐                 one row for each token and expert,
                              └─ count ─ add up ─ ends   │                 those of an expert in a run
                                                grouped product, and more ─ [back] ─ view(n, K, C)

Rows of different tokens stand in one tensor, but meet nowhere: a grouped product gives each row the weight of the run
that it stands in, which is that of its expert, and what is done in between is row-wise. So a row of the result is
computed from the rows of its own token, and other tokens only have it stand elsewhere in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zipvl_compile.passes.graph.reading import arguments, example, is_op, spelled, written
from zipvl_compile.passes.tokenwise.axis_rules import Mixes
from zipvl_compile.passes.tokenwise.backward_slice import reads_size
from zipvl_compile.passes.tokenwise.token_axis import carried


class Rows(Enum):
    """What a tensor of such a mixture holds; a pair is a token with one of its K experts."""

    PAIRS = auto()  # a row for each pair, those of a token together
    SORTED = auto()  # a row for each pair, by expert
    IDS = auto()  # the experts, sorted
    SORT = auto()  # both results of sorting
    ORDER = auto()  # which pair each sorted one is
    TOKENS = auto()  # which token each sorted pair is of
    BACK = auto()  # where each pair was sorted to
    COUNTS = auto()  # how many pairs each expert has
    ENDS = auto()  # where the pairs of each expert end
    NUMBERS = auto()  # 0, 1, .. for each pair


@dataclass
class Mixture:
    """The operations between the experts' ids and the results of all pairs, `[n, K, C]`.

    Attributes:
        ids: `[n, K]`.
        sort: what sorts them.
        nodes: the operations, and what each of them gives.
        tokens: what they read with a row for each token: `ids`, and others.
        result: the last one.
    """

    ids: Node
    sort: Node
    nodes: dict[Node, Rows] = field(default_factory=dict)
    tokens: list[Node] = field(default_factory=list)
    result: Node | None = None

    @property
    def experts(self) -> int:
        return example(self.ids).shape[1]

    @property
    def pairs(self) -> Any:
        return example(self.ids).shape[0] * self.experts


def find(sort: Node) -> Mixture:
    """Return the mixture that a call of `sort` or `argsort` belongs to.

    Raises:
        Mixes: it is none, or one that is not known to treat each token by itself.
    """
    flat = arguments(sort)["input"]
    mixture = Mixture(_whole(flat), sort)
    whole_numbers = example(flat).dtype in (torch.int32, torch.int64)
    if not isinstance(mixture.experts, int) or not whole_numbers or not _ascends(sort):
        raise Mixes("no experts are sorted")
    _add_pairs(flat, mixture)
    node = sort
    while mixture.result is None:
        if node.op == "output":
            raise Mixes("the sorted rows do not come back")
        if not mixture.nodes.keys().isdisjoint(node.all_input_nodes) and not reads_size(node):
            _add(node, mixture)
        node = node.next
    for inner in mixture.nodes:
        outside = [user for user in inner.users if user not in mixture.nodes]
        if inner is not mixture.result and outside:
            raise Mixes(f"{spelled(outside[0])!r} reads what is sorted by expert")
    return mixture


def _ascends(sort: Node) -> bool:
    """Return whether the least comes first, as the runs of a grouped product do, and as an inverse needs it."""
    given = arguments(sort)
    return given.get("descending", False) is False and given.get("dim", -1) in (0, -1)


def _whole(flat: Any) -> Node:
    """Return the tensor `[n, K]` of a flat one."""
    source = arguments(flat).get("input") if is_op(flat, "reshape", "view", "flatten") else None
    if source is None or example(flat).dim() != 1 or example(source).dim() != 2:
        raise Mixes("no experts are sorted")
    return source


def _add_pairs(flat: Node, mixture: Mixture) -> None:
    """Take in a flat tensor of pairs, and what it is a view of."""
    if flat in mixture.nodes:
        return
    source, ids = _whole(flat), example(mixture.ids)
    if not all(statically_known_true(a == b) for a, b in zip(example(source).shape, ids.shape, strict=True)):
        raise Mixes("there are tokens with other experts")
    mixture.nodes[flat] = Rows.PAIRS
    _add_token(source, mixture)


def _add_token(x: Node, mixture: Mixture) -> None:
    if not statically_known_true(example(x).shape[0] == example(mixture.ids).shape[0]):
        raise Mixes("rows of other tokens are taken")
    if x not in mixture.tokens:
        mixture.tokens.append(x)


def _add(node: Node, mixture: Mixture) -> None:
    given = {x: mixture.nodes[x] for x in node.all_input_nodes if x in mixture.nodes}
    kinds = set(given.values())
    kind = next((found for rule in _RULES if (found := rule(node, kinds, mixture)) is not None), None)
    if kind is None:
        kind = _row_wise(node, kinds, mixture)
    mixture.nodes[node] = kind
    if kind is Rows.PAIRS and _comes_apart(node, mixture):
        mixture.result = node


def _sorting(node: Node, kinds: set[Rows], mixture: Mixture) -> Rows | None:
    if node is mixture.sort:  # another one, of the same ids even, may order them otherwise
        return Rows.SORT if is_op(node, "sort") else Rows.ORDER
    if kinds == {Rows.SORT}:
        return (Rows.IDS, Rows.ORDER)[node.args[1]] if is_op(node, "getitem") else None  # type: ignore[index]
    return None


def _positions(node: Node, kinds: set[Rows], mixture: Mixture) -> Rows | None:
    if kinds == {Rows.ORDER} and is_op(node, "floor_divide"):
        return Rows.TOKENS if arguments(node)["other"] == mixture.experts else None
    if kinds == {Rows.ORDER} and is_op(node, "argsort") and _ascends(node):
        return Rows.BACK
    if kinds == {Rows.ORDER} and is_op(node, "empty_like"):
        return Rows.BACK if _is_inverse(node, mixture) else None
    if is_op(node, "setitem") and is_op(node.args[0], "empty_like"):
        return mixture.nodes.get(node.args[0])  # type: ignore[arg-type]  # `_is_inverse` has seen it
    return None


def _is_inverse(empty: Node, mixture: Mixture) -> bool:
    """Return whether all that is written to an empty tensor is `back[order] = arange`."""
    order = arguments(empty)["input"]
    writes = [user for user in empty.users if is_op(user, "setitem")]
    reads = [user for user in empty.users if user not in writes]
    if len(writes) != 1 or not all(is_op(user, "getitem", "index_select") and user > writes[0] for user in reads):
        return False
    given = arguments(writes[0])
    numbers = given["value"]
    if given["input"] is not empty or given["index"] is not order or not is_op(numbers, "arange"):
        return False
    if len(numbers.args) != 1 or not statically_known_true(example(numbers).shape[0] == mixture.pairs):
        return False
    mixture.nodes[numbers] = Rows.NUMBERS
    return True


def _counting(node: Node, kinds: set[Rows], mixture: Mixture) -> Rows | None:
    if kinds == {Rows.IDS} and is_op(node, "to", "float", "int", "long"):
        return Rows.IDS
    given = arguments(node) if is_op(node, "histc", "cumsum") else {}
    if kinds == {Rows.IDS} and is_op(node, "histc"):
        whole = given.get("min") == 0 and given.get("max") == given.get("bins", 100) - 1
        return Rows.COUNTS if whole else None
    if kinds == {Rows.COUNTS} and is_op(node, "cumsum"):
        return Rows.ENDS
    if kinds and kinds <= {Rows.COUNTS, Rows.ENDS} and is_op(node, "to", "int"):
        return next(iter(kinds))
    return None


def _taking(node: Node, kinds: set[Rows], mixture: Mixture) -> Rows | None:
    """Rows taken by an index: of tokens, of pairs, of experts."""
    if not is_op(node, "getitem", "index_select"):
        return None
    given = arguments(node)
    source, index = given["input"], given["index"]
    if given.get("dim", 0) != 0 or not isinstance(index, Node):
        return None
    kind, of_what = mixture.nodes.get(index), mixture.nodes.get(source)
    if kind is Rows.TOKENS and of_what is None:
        _add_token(source, mixture)
        return Rows.SORTED
    if kind is Rows.ORDER and of_what in (None, Rows.PAIRS):
        _add_pairs(source, mixture)
        return Rows.IDS if arguments(source)["input"] is mixture.ids else Rows.SORTED
    if kind is Rows.IDS and of_what is None:
        return Rows.SORTED  # such as the bias of each pair's expert
    return Rows.PAIRS if kind is Rows.BACK and of_what is Rows.SORTED else None


def _multiplying(node: Node, kinds: set[Rows], mixture: Mixture) -> Rows | None:
    if not is_op(node, "grouped_mm") or kinds != {Rows.SORTED, Rows.ENDS}:
        return None
    given = arguments(node)
    weight = given.get("other")
    fits = mixture.nodes.get(given["input"]) is Rows.SORTED and mixture.nodes.get(given.get("offs")) is Rows.ENDS  # type: ignore[arg-type]
    alone = weight not in mixture.nodes and given.get("bias") is None
    return Rows.SORTED if fits and alone and example(weight).dim() == 3 else None


def _row_wise(node: Node, kinds: set[Rows], mixture: Mixture) -> Rows:
    if kinds not in ({Rows.SORTED}, {Rows.PAIRS}) or written(node):
        raise Mixes(f"{spelled(node)!r} may mix what is sorted by expert")
    if kinds == {Rows.PAIRS} and _comes_apart(node, mixture):
        return Rows.PAIRS
    found = carried(node, 0)
    if set(found) != {x for x in node.all_input_nodes if x in mixture.nodes} or set(found.values()) != {0}:
        raise Mixes(f"{spelled(node)!r} may mix what is sorted by expert")
    return next(iter(kinds))


def _comes_apart(node: Node, mixture: Mixture) -> bool:
    """Return whether a call only gives the pairs two axes, `[n K, ..]` to `[n, K, ..]`."""
    source = node.args[0]
    if not is_op(node, "view", "reshape", "unflatten") or not isinstance(source, Node):
        return False
    old, new, ids = example(source).shape, example(node).shape, example(mixture.ids).shape
    sizes = zip(new, (*ids, *old[1:]), strict=False)
    return len(new) == len(old) + 1 and all(statically_known_true(a == b) for a, b in sizes)


_RULES = (_sorting, _positions, _counting, _taking, _multiplying)
