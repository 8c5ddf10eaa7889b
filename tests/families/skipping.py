"""A family whose tokens pass the layers that do not keep them, against its own eager layers on the kept tokens alone.

The eager model is given the positions that the compiled one kept. Each of its decoder layers then runs on these tokens
only, as if the prompt held no others, and the others keep what came in: no graph, no operator of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from support.tiny_models import FAMILIES, compiled, inputs, model
from torch import Tensor, nn
from transformers import Cache

import zipvl_compile
from zipvl_compile.report.compile_report import collect

SKIPPING = {"policy": "skip_layers", "keep_ratio": 0.5, "dense_layers": 0}
NARROWED = "only some of its rows are needed"


def generate(f: Any, x: dict) -> Any:
    """Return the first token, and what it was chosen from."""
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return f.generate(**x, **options)


def first_logits(family: str, batch: int = 1, **options: Any) -> tuple[Tensor, Tensor, list[str | None]]:
    """Return the logits after the prompt, compiled and written out, and why layers are not skipped, by site."""
    x = inputs(family, batch)
    with collect() as reports:
        out = generate(compiled(family, **SKIPPING, **options), x)
    pruned = [one for report in reports for one in report.pruned]
    kept = zipvl_compile.kept_tokens(out)
    eager, seen = model(family), set[str]()
    decoder = eager.get_submodule(FAMILIES[family].text_model)
    for one in pruned:
        path = f".{one.layer.split('model.')[-1]}"
        names = [name for name, _ in decoder.named_modules() if f".{name}".endswith(path)]
        # A graph of a single layer counts paths from it.
        name = names[0] if len(names) == 1 else next(name for name in names if name not in seen)
        seen.add(name)
        number = int(next(part for part in reversed(name.split(".")) if part.isdigit()))
        _run_on(decoder.get_submodule(name.rpartition(".")[0]), kept[number][:, 0])
    expected = generate(eager, x) if pruned else out
    return out.logits[0], expected.logits[0], [one.skipped for one in pruned]


def _run_on(layer: nn.Module, kept: Tensor) -> None:
    """Have a layer see the tokens `kept [B, P]` of its prompts only, and give the others back as they came."""
    of_all = layer.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        n = hidden.shape[1]
        if n == 1:  # decoding
            return of_all(hidden, *args, **kwargs)

        def take(x: Any, sample: int) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(take(one, sample) for one in x)
            if isinstance(x, Cache) and kept.shape[0] > 1:
                return None  # which would take samples for parts of one prompt
            if not isinstance(x, Tensor):
                return x
            if x.dim() and x.shape[0] == kept.shape[0]:
                x = x[sample : sample + 1]
            for axis in range(x.dim()):
                if x.shape[axis] == n:
                    x = x.index_select(axis, kept[sample])
            return x

        def of_one(sample: int) -> tuple[Tensor, Any]:
            given = [take(x, sample) for x in (hidden, *args)]
            out = of_all(*given, **{name: take(x, sample) for name, x in kwargs.items()})
            rows = out[0] if isinstance(out, tuple) else out
            return hidden[sample : sample + 1].index_copy(1, kept[sample], rows), out

        each = [of_one(sample) for sample in range(kept.shape[0])]
        full, out = torch.cat([rows for rows, _ in each]), each[0][1]
        return (full, *out[1:]) if isinstance(out, tuple) else full

    layer.forward = forward  # type: ignore[method-assign]


def run(family: str, batch: int = 1, **options: Any) -> tuple[float, float, list[str | None]]:
    """Return the largest difference of the logits, of compiled to written out and to dense, and why layers are not
    skipped, by attention; a model that forbids some tokens gives them logits that are no numbers of its own."""
    torch._dynamo.reset()
    got, expected, reasons = first_logits(family, batch, **options)
    dense = generate(model(family), inputs(family, batch)).logits[0]
    allowed = expected.abs() < 1e6
    size = expected[allowed].abs().max()
    return *(float((got - other)[allowed].abs().max() / size) for other in (expected, dense)), reasons
