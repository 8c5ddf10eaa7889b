"""Run one family through everything that is promised for every family, and say what came out.

`PYTHONPATH=tests python -m families.run llava gemma3` prints it; tests/models/test_families.py asserts it;
tests/families/table.py makes docs/models.md of it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from families.family import REWRITTEN
from support.tiny_models import FAMILIES, compiled, inputs, model
from transformers import DynamicCache

from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.pipeline import leaving_out
from zipvl_compile.report.compile_report import CompileReport, collect

RESULTS = Path(__file__).parents[2] / "build" / "families"
NEW_TOKENS = 8
TAU = 0.9
SPARSE = {"policy": "paper", "tau": TAU}  # the rule that prunes projections


@dataclass
class Result:
    """What became of a family.

    Attributes:
        family, model: its name and its class.
        rewritten: decoder attention sites of one prefill that were rewritten.
        dense: decoder attention sites that were not, by reason.
        outside: attention sites of vision towers and encoders, which stay dense.
        surprises: dense sites that nobody expects: a warning, or a decoder site that is not by design.
        exact: by run, whether tau=1 equals eager: equal greedy tokens, or logits within 1e-4.
        distinct: by run, how many different new tokens eager gave; few show little.
        cache_layers: classes of the cache's layers.
        kept: by cache layer, fraction of the prompt that it keeps at tau=0.9; None where it is not compacted.
        finite: whether all logits at tau=0.9 are finite.
        pruned: attention sites at tau=0.9 whose q, v or output projection is computed for kept tokens only.
        pruning_exact: whether that changes no token and no logit.
        seconds: of the whole run.
    """

    family: str
    model: str
    rewritten: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    outside: int = 0
    surprises: list[str] = field(default_factory=list)
    exact: dict[str, bool] = field(default_factory=dict)
    distinct: dict[str, int] = field(default_factory=dict)
    cache_layers: list[str] = field(default_factory=list)
    kept: list[float | None] = field(default_factory=list)
    finite: bool = True
    pruned: dict[str, int] = field(default_factory=dict)
    pruning_exact: bool = True
    seconds: float = 0.0

    def save(self) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{self.family}.json").write_text(json.dumps(asdict(self), indent=1))


def generate(f: Any, x: dict, **more: Any) -> Any:
    return f.generate(**x, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **more)


def forward(f: Any, x: dict, family: str) -> Any:
    cache = {} if FAMILIES[family].makes_cache else as_argument(DynamicCache(config=f.config.get_text_config()))
    return f(**x, **cache, use_cache=True)


def prompts(family: str) -> dict[str, dict]:
    """Return the prompts of the generation runs: batch 1, and batch 2 with left padding."""
    if not FAMILIES[family].generates:
        return {}
    runs = {"generate": inputs(family)}
    if FAMILIES[family].pads:
        runs["padded generate"] = inputs(family, batch=2, text=14, pad=5, seed=3)
    return runs


def run(family: str) -> Result:
    """Run a direct forward, a generate and a padded one at tau=1 against eager, and one as `SPARSE` says."""
    start = time.time()
    torch._dynamo.reset()
    f, eager, x = compiled(family, tau=1.0), model(family), inputs(family)
    result = Result(family, type(eager).__name__)
    with torch.no_grad(), collect() as reports:
        got, expected = forward(f, x, family).logits, forward(eager, x, family).logits
    result.exact["forward"] = torch.allclose(got, expected, atol=1e-4, rtol=1e-4)
    note_sites(result, reports)
    for name, x in prompts(family).items():
        note_tokens(result, name, generate(f, x).sequences, generate(eager, x).sequences)
        last = x
    if FAMILIES[family].generates:
        # After other calls a number of rows that are read may be a symbol, and such rows are kept on top of the budget.
        torch._dynamo.reset()
        with collect() as reports:
            out = generate(compiled(family, **SPARSE), last, output_logits=True)
        note_compaction(result, out)
        result.pruned = dict(Counter(part for report in reports for one in report.pruned for part in one.parts))
        if result.pruned:
            torch._dynamo.reset()
            with leaving_out("prune_projections", "demand_rows"):
                result.pruning_exact = same_answer(out, generate(compiled(family, **SPARSE), last, output_logits=True))
    result.seconds = round(time.time() - start, 1)
    return result


def same_answer(one: Any, other: Any) -> bool:
    """Return whether two generations have equal tokens, and logits within 1e-4 of their size."""
    pairs = zip(one.logits, other.logits, strict=True)
    return torch.equal(one.sequences, other.sequences) and all(
        torch.allclose(a, b, atol=1e-4 * float(b.abs().max()), rtol=0) for a, b in pairs
    )


def note_tokens(result: Result, name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    result.exact[name] = torch.equal(got, expected)
    result.distinct[name] = len(expected[:, -NEW_TOKENS:].unique())


def note_sites(result: Result, reports: list[CompileReport]) -> None:
    sites = [site for report in reports for site in report.sites]
    result.rewritten = sum(site.rewritten for site in sites)
    expected = tuple(reason for reason in FAMILIES[result.family].decoder if reason != REWRITTEN) or ("expected",)
    dense = [site for site in sites if not site.rewritten]
    outside = [s for s in dense if s.kind == "other" and s.by_design and not str(s.reason).startswith(expected)]
    inside = [site for site in dense if site not in outside]
    result.outside, result.dense = len(outside), dict(Counter(str(site.reason) for site in inside))
    surprising = [site for site in inside if not str(site.reason).startswith(expected)]
    result.surprises = sorted({f"{site.layer} {site.kind}: {site.reason}" for site in surprising})


def note_compaction(result: Result, out: Any) -> None:
    cache = getattr(cache_of(out), "self_attention_cache", cache_of(out))
    result.cache_layers = [type(layer).__name__ for layer in cache.layers]
    kept = [(getattr(layer, "positions", None), layer) for layer in cache.layers]
    result.kept = [None if k is None else round(k.shape[2] / layer.prompt_length, 3) for k, layer in kept]
    result.finite = all(bool(logits.isfinite().all()) for logits in out.logits)


def problems(result: Result) -> list[str]:
    """Return where a result breaks a promise, one sentence each; empty where all is well."""
    expected = FAMILIES[result.family].decoder
    found = [f"{name} differs from eager at tau=1" for name, same in result.exact.items() if not same]
    found += [f"not expected to stay dense: {surprise}" for surprise in result.surprises]
    if not result.finite:
        found.append("logits at tau=0.9 are not finite")
    if not result.pruning_exact:
        found.append(f"pruned projections change the answer at tau={TAU}")
    wanted = Counter(expected)
    if result.rewritten != wanted.pop(REWRITTEN, 0):
        found.append(f"{result.rewritten} sites rewritten, {expected.count(REWRITTEN)} expected")
    for reason, count in wanted.items():
        dense = sum(n for given, n in result.dense.items() if given.startswith(reason))
        if dense < count:
            found.append(f"{dense} sites dense because of {reason!r}, {count} expected")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name in sys.argv[1:] or FAMILIES:
        try:
            outcome = run(name)
        except Exception as error:
            print(f"{name}: FAILED {type(error).__name__}: {error}"[:1500], flush=True)
            continue
        outcome.save()
        print(f"{name} {outcome.seconds:.0f} s", *problems(outcome), asdict(outcome), sep="\n   ", flush=True)
