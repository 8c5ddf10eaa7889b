"""Write the tables of README.md and the pages of docs/, and the plot: `python benchmarks/tables.py`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from gpu_table import gpu
from newest import ROOT, latest, source

from zipvl_compile.evaluate.variants import OF_PRESETS, VARIANTS


def _by_variant() -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """Return the speed figures as `{(bench, case): {variant: {metric: value}}}`."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(dict)
    for (bench, case, variant), metrics in latest("speed").items():
        found[bench, case][variant] = {metric: line["value"] for metric, line in metrics.items()}
    return found


def speed() -> str:
    """Return the table of prefill and generate."""
    table = [
        "| | dense | zipvl | speedup | without projection pruning | attention alone | queries all | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = latest("speed")
    model = next(iter(rows))[1].rsplit(", ", 1)[0]
    for (bench, case), variants in _by_variant().items():
        value = variants["zipvl"]
        others = [
            f"{variants[name]['speedup']:.2f}x" if name in variants else ""
            for name in ("unpruned projections", "unpruned", "queries all")
        ]
        bound = f"{value['bound']:.2f}x" if "bound" in value else ""
        cells = [f"{bench}, {case.removeprefix(f'{model}, ')}", f"{value['dense']:.1f} ms", f"{value['zipvl']:.1f} ms"]
        table.append("| " + " | ".join([*cells, f"{value['speedup']:.2f}x", *others, bound]) + " |")
    return "\n".join([*table, "", f"{model}, keep_ratio 0.367. {source(rows)}"])


def decode() -> str:
    """Return the times of a decode step and the sizes of the cache, by model, prompt length and batch."""
    names = ["dense", "dense, static", "zipvl", "zipvl, static", "full cache"]
    table = [
        "| | Inductor | over a static cache | zipvl | over a static cache | its full cache | bound | KV: dense | zipvl "
        "| static | allocated | static |",
        "|" + "---|" * 12,
    ]
    rows, cases = latest("decode"), defaultdict[str, dict[str, dict[str, float]]](dict)
    for (_, case, variant), metrics in rows.items():
        cases[case][variant] = {metric: line["value"] for metric, line in metrics.items()}
    for case, of in cases.items():
        times = [
            f"{of['dense']['time']:.1f} ms",
            *(f"{of[name]['time']:.1f} ms ({of[name]['speedup']:.2f}x)" for name in names[1:]),
        ]
        held = [f"{of[name]['kv_in_use']:.1f} MB" for name in ("dense", "zipvl", "zipvl, static")]
        held += [f"{of[name]['kv_allocated']:.1f} MB" for name in ("zipvl", "zipvl, static")]
        table.append(
            "| "
            + " | ".join([case.replace(", 8 layers, GQA 4", ""), *times, f"{of['zipvl']['bound']:.2f}x", *held])
            + " |"
        )
    return "\n".join([*table, "", f"8 layers, GQA 4, keep_ratio 0.367. {source(rows)}"])


def never_slower() -> str:
    """Return the speedup of prefill with the default options, by prompt length and kept ratio."""
    rows = latest("never_slower")
    speedups: dict[str, dict[str, str]] = defaultdict(dict)
    for (_, case, variant), metrics in rows.items():
        dense = " *" if metrics["cached"]["value"] == 1 else ""
        speedups[case.rsplit(", ", 1)[1]][variant] = f"{metrics['speedup']['value']:.2f}x{dense}"
    names = list(next(iter(speedups.values())))
    table = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    table += ["| " + " | ".join([n, *(of[name] for name in names)]) + " |" for n, of in speedups.items()]
    return "\n".join([*table, "", f"\\* left dense. {next(iter(rows))[1].rsplit(', ', 1)[0]}. {source(rows)}"])


def compile_time() -> str:
    """Return how long zipvl compiles, against Inductor."""
    rows = latest("compile_time")
    value = {(part, how): metrics for (part, _, how), metrics in rows.items()}
    parts = ("prefill and decode", "prefill")
    (both, prefill), paper = ([value[part, how] for part in parts] for how in ("by default", "paper"))
    return (
        f"Compiling prefill and decode with empty caches takes {both['zipvl']['value']:.0f} s by default, "
        f"{both['ratio']['value']:.2f} times Inductor's {both['dense']['value']:.0f} s; prefill alone "
        f"{prefill['ratio']['value']:.2f} times. With the paper's rule, which prunes projections, it is "
        f"{paper[0]['ratio']['value']:.2f} and {paper[1]['ratio']['value']:.2f} times. {source(rows)}"
    )


def collectives() -> str:
    """Return what ranks sum in a prefill, and how long that takes in a large model on paper."""
    rows = latest("collectives")
    table = [
        "| | output projections | MLPs | scores | of dense: output projections | MLPs | on paper: NVLink | PCIe |",
        "|" + "---|" * 8,
    ]
    for name in dict.fromkeys(variant for _, _, variant in rows):
        value = {
            bench: [line["value"] for line in metrics.values()]
            for (bench, _, variant), metrics in rows.items()
            if variant == name
        }
        cells = [name, *(f"{count / 1e6:.2f} MB" for count in value["bytes of a prefill"])]
        cells += [f"{share:.1%}" for share in value["share of dense"]] + [
            f"{time:.0f} ms" for time in value["on paper"]
        ]
        table.append("| " + " | ".join(cells) + " |")
    (case,) = {case for _, case, _ in rows}
    return "\n".join([*table, "", f"{case}, keep_ratio 0.367. {source(rows)}"])


def draw() -> None:
    """Draw the speedup of prefill against the prompt length into results/speed.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for (bench, case), variants in _by_variant().items():
        if bench == "prefill":
            n = int(case.rsplit(", ", 1)[1].split()[0])
            for variant, value in variants.items():
                curves[variant].append((n, value["speedup"]))
            curves["bound without pruning (Amdahl)"].append((n, variants["zipvl"]["bound"]))
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in curves.items():
        lengths, speedups = zip(*sorted(points), strict=True)
        axes.plot(lengths, speedups, label=name, marker="o", linestyle="--" if "bound" in name else "-")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="prompt (tokens)", ylabel="prefill speedup over Inductor")
    ticks = sorted({n for points in curves.values() for n, _ in points})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "benchmarks" / "results" / "speed.png", dpi=120)


def frontier(variants: Iterable[str] = tuple(VARIANTS)) -> str:
    """Return what rules cost on each model: kept tokens, loss, points, cache and FLOPs."""
    rows = latest("frontier")
    cases = {case.split(",")[0]: case for _, case, _ in rows}
    of = {
        (model, variant): {metric: line["value"] for metric, line in metrics.items()}
        for model, case in cases.items()
        for (_, of_case, variant), metrics in rows.items()
        if of_case == case
    }
    table = [
        "| | SmolLM2: kept | loss | repeating | Gemma 3: kept | loss | repeating | LVLM: kept | one token | several | "
        "KV bytes | prefill FLOPs |",
        "|---" * 12 + "|",
    ]
    of_presets = {variant: preset for preset, variant in OF_PRESETS.items()}
    for variant in variants:
        cells = [f"**{variant}** (`{of_presets[variant]}`)" if variant in of_presets else variant]
        for model in ("smollm2", "gemma3"):
            m = of.get((model, variant))
            cells += (
                ["", "", ""] if m is None else [f"{m['kept']:.0%}", *(_loss(m, name) for name in ("nll", "rep_nll"))]
            )
        m = of.get(("tiny_lvlm", variant))
        kinds = ("single_token", "multi_token")
        cells += ["", "", ""] if m is None else [f"{m['kept']:.0%}", *(_points(m, kind) for kind in kinds)]
        m = of.get(("smollm2", variant), m)
        cells += ["", ""] if m is None else [f"{m['kv_bytes_of_dense']:.0%}", f"{m['prefill_flops_of_dense']:.0%}"]
        if any(cells[1:]):
            table.append("| " + " | ".join(cells) + " |")
    return "\n".join([*table, "", f"{'; '.join(cases.values())}. {source(rows)}"])


def presets() -> str:
    """Return what the presets cost: their rows of `frontier`."""
    return frontier(OF_PRESETS[name] for name in ("quality", "balanced", "fast", "paper"))


def graph() -> str:
    """Return a graph before and after the passes."""
    from graph_example import page

    return page()


def rules(file: str = "rules") -> str:
    """Return the speedup of prefill by each rule, with the bound that its own FLOPs allow."""
    rows = latest(file)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for (_, case, variant), metrics in rows.items():
        m = {name: line["value"] for name, line in metrics.items()}
        found[case.rsplit(", ", 1)[1]][variant] = f"{m['speedup']:.2f}x of {m['bound']:.2f}x"
    names = list(next(iter(found.values())))
    table = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    table += ["| " + " | ".join([n, *(of.get(name, "") for name in names)]) + " |" for n, of in found.items()]
    said = "Over Inductor, and what its own FLOPs allow"
    return "\n".join([*table, "", f"{said}. {next(iter(rows))[1].rsplit(', ', 1)[0]}. {source(rows)}"])


def skipped_layers() -> str:
    """Return the speedup of prefill where tokens pass layers, with the bound that its own FLOPs allow."""
    return rules("skipped_layers")


def pictures() -> str:
    """Return what an answer about one picture takes by `generate`, dense and zipvl."""
    rows = latest("pictures")
    table = [
        "| image tokens | | prefill: dense | zipvl | | decode: dense | zipvl | | KV bytes |",
        "|---" * 9 + "|",
    ]
    for (_, case, variant), metrics in rows.items():
        m = {name: line["value"] for name, line in metrics.items()}
        times = (m["dense"], m["zipvl"], m["decode_dense"], m["decode_zipvl"])
        first, then, decode, later = (f"{value:.0f} ms" for value in times)
        cells = [case.split()[-2], variant, first, then, f"{m['speedup']:.2f}x"]
        cells += [decode, later, f"{m['decode_speedup']:.2f}x", f"{m['kv_bytes']:.0%}"]
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join([*table, "", f"{next(iter(rows))[1].rsplit(', ', 1)[0]}. {source(rows)}"])


def demo() -> str:
    """Return what the demo measures, dense and zipvl, and how few tokens do."""
    rows = latest("demo")
    value = {
        (bench, variant): {name: line["value"] for name, line in metrics.items()}
        for (bench, _, variant), metrics in rows.items()
    }
    dense, zipvl = value["generate", "dense"], value["generate", "zipvl"]

    def line(name: str, metric: str, shown: str, factor: float = 1.0) -> str:
        cells = [shown.format(row[metric] * factor) for row in (dense, zipvl)]
        return f"| {name} | {cells[0]} | {cells[1]} | {dense[metric] / zipvl[metric]:.1f}x |"

    table = ["| | dense | zipvl | |", "|---|---|---|---|"]
    table.append(line("prefill: picture to first word", "prefill", "{:.0f} ms"))
    table.append(line("decode: each further word", "decode", "{:.1f} ms"))
    table.append(line("KV cache, memory allocated", "kv_bytes", "{:.1f} MB", 1e-6))
    right = [f"{row['right']:.0%}" for row in (dense, zipvl)]
    table.append(f"| right answers | {right[0]} | {right[1]} | {zipvl['same']:.0%} the same |")
    budgets = [variant.split()[1] for bench, variant in value if bench == "budget" and variant.startswith("chosen")]
    parts, asked = [], value["budget", f"chosen {budgets[0]}"]["questions"]
    for share in budgets:
        chosen, drawn = (value["budget", f"{name} {share}"]["right"] * asked for name in ("chosen", "random"))
        parts.append(f"{chosen:.0f} with {float(share):.0%} of the tokens ({drawn:.0f} with as many random ones)")
    said = f"Of {asked:.0f} questions, it answers rightly {', '.join(parts)}."
    return "\n".join([*table, "", f"{said} By `generate`, {next(iter(rows))[1]}. {source(rows)}"])


def _loss(m: dict[str, float], name: str) -> str:
    """Return how much a negative log-likelihood is above that of the dense model, in nats."""
    if f"{name}_minus_dense" not in m:
        return f"{m[name]:.3f}"
    error = m.get(f"{name}_minus_dense_se", 0.0)
    return f"{m[f'{name}_minus_dense']:+.3f} ± {error:.3f}" if name == "nll" else f"{m[f'{name}_minus_dense']:+.2f}"


def _points(m: dict[str, float], kind: str) -> str:
    """Return how many points of accuracy are gained or lost against the dense model."""
    difference = m.get(f"accuracy_{kind}_minus_dense")
    if difference is None:
        return f"{m[f'accuracy_{kind}']:.1%}"
    return f"{100 * difference:+.1f} ± {100 * m.get(f'accuracy_{kind}_minus_dense_se', 0.0):.1f}"


TABLES = {
    "speed": speed, "decode": decode, "never_slower": never_slower, "compile_time": compile_time, "frontier": frontier,
    "gpu": gpu, "rules": rules, "skipped_layers": skipped_layers, "pictures": pictures, "demo": demo,
    "presets": presets, "graph": graph, "collectives": collectives,
}  # fmt: skip
PAGES = ("README.md", "docs/accuracy.md", "docs/how-it-works.md", "docs/scale.md", "docs/speed.md")


def render(text: str) -> str:
    """Return a page with its tables replaced."""
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->",
        text,
        flags=re.S,
    )


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(render((ROOT / page).read_text()))
    draw()
