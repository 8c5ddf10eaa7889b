"""Whether a traced call must stay differentiable: said once for each graph, to its cache layers and to the backend.

It must where gradients are on and an input requires one, or a trainable parameter does whose module is in training
mode. Parameters of modules in eval mode do not count: most manual generation loops forget `torch.no_grad()`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from zipvl_compile.dynamo import UserError, gradient_switches, is_zipvl, translator

#: What was said of each graph that is being traced, by the translator of its frame.
_said: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result
def tracing_for_zipvl() -> bool:
    """Return whether Dynamo traces the current frame for this backend, for inference.

    Read by the cache layers while they are traced; a constant of the compiled code, which Dynamo keeps per backend.
    """
    tracing = translator()
    return tracing is not None and is_zipvl(tracing.output.compiler_fn) and not _say(tracing.output)


def gradients_matter() -> bool:
    """Return whether the graph that Dynamo has traced must stay differentiable.

    Raises:
        UserError: its cache layers were told that it need not, and what requires gradients entered after the first.
    """
    tracing = translator()
    if tracing is None:
        return torch.is_grad_enabled()
    said = _say(tracing.output)
    if not said and _matter(tracing.output):
        raise UserError(
            "gradients: expected every tensor that requires them to be an argument of the compiled call, got one that "
            "enters it behind the first KV cache layer. Pass it as an argument, detach it, or run under "
            "torch.no_grad()."
        )
    return said


def _say(output: Any) -> bool:
    """Return the same as to whoever asked first about the graph."""
    if output.root_tx not in _said:
        _said[output.root_tx] = _matter(output)
    return _said[output.root_tx]


def _matter(output: Any) -> bool:
    """Decide it from the arguments of the traced frame and from the inputs of its graph so far.

    Later layers may read arguments that are no input yet, so that all of them count, and all parameters of a module.
    """
    frame, graph = output.root_tx, output.root_tracer.graph
    if not torch.is_grad_enabled() and not gradient_switches(graph):
        return False
    inputs = [node.meta["grapharg"] for node in graph.find_nodes(op="placeholder") if "grapharg" in node.meta]
    given = [*_leaves(list(frame.f_locals.values())), *(one.example for one in inputs)]
    roots = {value for value in given if isinstance(value, torch.nn.Module)}
    scope, values = (frame.f_globals, dict(frame.f_locals)), dict[Any, Any]()
    roots |= {root for one in inputs if (root := _outermost_module(one.source, scope, values)) is not None}
    parts = {part for root in roots for part in root.modules()}
    trained = [p for part in parts if part.training for p in part.parameters(recurse=False)]
    parameters = {id(p) for part in parts for p in part.parameters(recurse=False)}
    tensors = [x for x in given if isinstance(x, torch.Tensor) and id(x) not in parameters]
    return any(x.requires_grad for x in (*trained, *tensors))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what nested lists, tuples and dictionaries hold."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _outermost_module(
    source: Any, scope: tuple[dict[str, Any], dict[str, Any]], values: dict[Any, Any]
) -> torch.nn.Module | None:
    """Return the outermost module on the way to a graph input, such as the model to `model.lm_head.weight`.

    Args:
        scope: globals and locals of the traced frame; the latter are written to.
        values: of the sources that were looked at before; extended.
    """
    found = None
    while source is not None:
        try:
            value = source.get_value(*scope, values)
        except Exception:  # a way that only Dynamo's guards can go: not through modules
            value = None
        found = value if isinstance(value, torch.nn.Module) else found
        source = getattr(source, "base", None)
    return found
