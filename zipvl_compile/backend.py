"""The backend: options in, rewritten graph compiled, callable out.

`torch.compile(model, backend="zipvl")` finds `zipvl` through the `torch_dynamo_backends` entry point. Loading this
module also registers the KV cache layer with transformers, before the model makes its first cache.
"""

from __future__ import annotations

import functools
import logging
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from zipvl_compile.cache import compact_layer as _kv_cache  # noqa: F401  (registers the cache layer)
from zipvl_compile.cache import compact_static_layer as _static_kv_cache  # noqa: F401  (as above)
from zipvl_compile.caches_apart import caches_apart
from zipvl_compile.dynamo import (
    PAST_THE_LIMIT,
    allow_data_dependent_sizes,
    backend_of_call,
    gradient_switches,
    leave_uncompiled,
    mark_address_as_fixed,
    mark_size_as_changing,
    set_up_calls,
    zipvl_backend,
)
from zipvl_compile.gradients import gradients_matter
from zipvl_compile.inner_compilers import compile_with_aot_eager, compile_with_inductor, inductor_modes
from zipvl_compile.kernels.fixed_rows import into_bucket
from zipvl_compile.kernels.ops import ops
from zipvl_compile.options import ZipVLOptions, check_fits_static_cache
from zipvl_compile.passes.graph.graph import calls, copied, is_call
from zipvl_compile.passes.graph.op_calls import KVViewCall
from zipvl_compile.passes.graph.private import without_repeated_fakes
from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.prefill.selection import BUDGET, LAYERS
from zipvl_compile.per_request import budget_of_call, check_can_change
from zipvl_compile.pipeline import rewrite, settings_of
from zipvl_compile.report.compile_report import record, record_training
from zipvl_compile.report.requests import note_graph, print_requests_if_asked

log = logging.getLogger("zipvl_compile")
# Decorators of transformers share one code object, and every prompt shape of every model counts against its limit.
# PyTorch's 8 are soon used up, and everything after that runs in eager mode. The lengths of a cache change with every
# step and prompt: a graph for the first ones alone would serve one step.
set_up_calls(256, r".*\.cumulative_length,.*\.prompt_length")
print_requests_if_asked()
# Functions of transformers that count image tokens, and that write sizes into a message: Dynamo compiles them anew for
# every number of image tokens, to compute next to nothing. Behind a graph break of their own, each is a frame.
CHEAP = ("get_placeholder_mask",)


@zipvl_backend
def zipvl(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with sparse prefill and a compacted KV cache.

    Args:
        gm: the graph that Dynamo traced.
        example_inputs: its fake inputs.
        options: see `ZipVLOptions`.
        mode: of Inductor.

    Returns:
        A callable with the calling convention of `gm`.

    Raises:
        OptionError: (a ValueError) an unknown option or a bad value.
    """
    parsed = ZipVLOptions.parse(options, mode)
    leave_uncompiled(*CHEAP)
    if gradients_matter():
        record_training(gm.graph)
        return _compile(gm, example_inputs, parsed)
    allow_data_dependent_sizes(gm.graph)
    _run_without_gradients(gm)
    dense = GraphModule(gm, copied(gm.graph))
    settings = settings_of(parsed)
    done = rewrite(copied(gm.graph), settings)  # Dynamo reads its graph once more, and knows no input of ours
    gm.graph = done.graph
    report = record(done)
    gm.recompile()
    fixed = _take_marks_of_size(gm)
    if fixed:
        check_fits_static_cache(parsed)
    cached, chosen = sorted({*_cache_outputs(gm)} - {*fixed}), _outputs_of(gm, ops.select_tokens)
    chooses = bool(calls(gm.graph, ops.select_tokens))
    fresh = chooses and not calls(dense.graph, ops.kv_view)  # else it reads a compacted cache, which no dense code can
    budget = gm.graph.find_nodes(op="placeholder", target=BUDGET)
    with torch.no_grad(), without_repeated_fakes() if chooses else nullcontext():
        compiled = _compile(
            gm, [*example_inputs, *map(example, budget)], parsed, _keeps_its_sizes(dense.graph, parsed.mode)
        )
    backend = backend_of_call()

    def run(*inputs: Any) -> Any:
        note_graph(report)
        with torch.no_grad():
            if fresh and backend_of_call() not in (None, backend):
                _warn_of_other_code()
                return dense(*inputs)
            if budget:
                inputs = (*inputs, budget_of_call(settings.budget, budget[0].meta[LAYERS]))
            elif chooses:
                check_can_change()
            outputs = compiled(*inputs)
        if chosen and log.isEnabledFor(logging.INFO):
            _say_what_is_kept([outputs[index] for index in chosen])
        for index in cached:
            mark_size_as_changing(outputs[index], 2)
        return _with_fixed_sizes(outputs, fixed) if fixed else outputs

    return run


@functools.cache
def _warn_of_other_code() -> None:
    """Say why a prompt is computed densely: past the recompile limit, Dynamo runs code of any backend that fits."""
    warnings.warn(
        "zipvl: PyTorch has reached its recompile limit, and ran code that was compiled for another torch.compile "
        f"call, with other options. This prompt is left dense instead. {PAST_THE_LIMIT}",
        UserWarning,
        stacklevel=2,
    )


@functools.cache
def _warn_of_a_cache_that_grows(mode: str) -> None:
    """Say, once per process, why decode steps are not recorded though the mode asks for it, on GPUs."""
    if torch.cuda.is_available() and inductor_modes()[mode].get("triton.cudagraphs"):
        warnings.warn(
            f"zipvl: mode={mode!r} records no decode steps over a KV cache that grows, since each has another size. "
            "Pass generate(..., cache_implementation='static'), or a StaticCache, for steps of one size.",
            UserWarning,
            stacklevel=2,
        )


def _run_without_gradients(gm: GraphModule) -> None:
    """Erase the graph's own switches of gradient mode, such as the end of a `torch.no_grad()` in a rotary embedding.

    The whole graph runs under `no_grad`; a switch back on would have the inner compiler trace a backward.
    """
    for node in gradient_switches(gm.graph):
        gm.graph.erase_node(node)
    gm.recompile()


def _cache_outputs(gm: GraphModule) -> list[int]:
    """Return which outputs of a prefill graph are cache buffers and positions.

    How many tokens they hold changes with every prompt; marked so, decode compiles for any number at once instead of
    once more for every layer that happened to keep equally many tokens twice.
    """
    return _outputs_of(gm, ops.gather_tokens, ops.gather_kv, ops.with_room, ops.select_tokens, ops.token_positions,
                       ops.to_host, ops.quantise_tokens, torch.take_along_dim)  # fmt: skip


def _take_marks_of_size(gm: GraphModule) -> list[int]:
    """Return which outputs of a graph are tensors of a static cache, and erase their marks."""
    marked = _outputs_of(gm, ops.fixed_rows)
    for node in calls(gm.graph, ops.fixed_rows):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        gm.graph.erase_node(node)
    gm.recompile()
    return marked


def _with_fixed_sizes(outputs: Sequence[Any], fixed: list[int]) -> list[Any]:
    """Return outputs of a prompt, those of static caches with the sizes that decoding finds from now on."""
    outputs = list(outputs)
    for index in fixed:
        outputs[index] = into_bucket(outputs[index])
        mark_address_as_fixed(outputs[index])
    return outputs


def _outputs_of(gm: GraphModule, *kinds: Any) -> list[int]:
    """Return which outputs of a graph are results of these operators."""
    outputs = gm.graph.output_node().args[0]
    made_by = [node.args[0] if is_call(node, operator.getitem) else node for node in outputs]  # type: ignore
    return [i for i, node in enumerate(made_by) if any(is_call(node, kind) for kind in kinds)]


def _say_what_is_kept(positions: list[torch.Tensor]) -> None:
    """Log one line on a prompt, for which a GPU has to be waited for."""
    n = max(int(one.max()) for one in positions) + 1
    shares = [one.shape[2] / n for one in positions]
    log.info(
        "zipvl: prompt of %d tokens: %d layers keep %.1f%% of it (%.1f%% to %.1f%%)",
        n, len(shares), *(100 * share for share in (sum(shares) / len(shares), min(shares), max(shares))),
    )  # fmt: skip


def _keeps_its_sizes(graph: Graph, mode: str | None) -> bool:
    """Return whether a graph is worth recording as a CUDA graph: it neither reads a prompt nor a cache that grows.

    A prompt has another length every time, and its cache outlives the memory that a recorded graph gives its results.
    """
    grows = any(call.held is None for call in KVViewCall.all(graph))
    if grows and mode is not None:
        _warn_of_a_cache_that_grows(mode)
    return not grows and not calls(graph, ops.token_positions)


def _compile(
    gm: GraphModule, example_inputs: list[Any], options: ZipVLOptions, records: bool = True
) -> Callable[..., Any]:
    """Hand the rewritten graph to the inner compiler; `records`: it may become a CUDA graph."""
    if options.inner == "eager":
        return gm.forward
    if options.inner == "aot_eager":
        return compile_with_aot_eager(gm, example_inputs)
    with caches_apart():
        return compile_with_inductor(gm, example_inputs, options.mode, records)
