"""Write the tables of README.md and docs/speed.md, and the plot: `python benchmarks/tables.py`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from zipvl_compile.evaluate.variants import OF_PRESETS, VARIANTS

ROOT = Path(__file__).parent.parent


def latest(file: str) -> dict[tuple[str, str, str], dict[str, dict]]:
    """Return the newest measurement of each metric: `{(bench, case, variant): {metric: line}}`, in file order."""
    path = ROOT / "benchmarks" / "results" / f"{file}.jsonl"
    found: dict[tuple[str, str, str], dict[str, dict]] = defaultdict(dict)
    for text in path.read_text().splitlines():
        line = json.loads(text)
        found[line["bench"], line["case"], line["variant"]][line["metric"]] = line
    return found


def source(rows: dict) -> str:
    """Return where the figures come from, as one line."""
    line = next(iter(next(iter(rows.values())).values()))
    commits = list(dict.fromkeys(line["commit"] for metrics in rows.values() for line in metrics.values()))
    return (
        f"{line['hardware']}; torch {line['torch']}, transformers {line['transformers']}; {line['date']}, "
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}."
    )


def _by_variant() -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """Return the speed figures as `{(bench, case): {variant: {metric: value}}}`."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(dict)
    for (bench, case, variant), metrics in latest("speed").items():
        found[bench, case][variant] = {metric: line["value"] for metric, line in metrics.items()}
    return found


def speed() -> str:
    """Return the table of prefill, decode and generate."""
    table = [
        "| | dense | zipvl | speedup | without projection pruning | attention alone | queries all | bound | KV kept |",
        "|---|---|---|---|---|---|---|---|---|",
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
        kept = f"{value['kv_bytes_kept']:.0%}" if "kv_bytes_kept" in value else ""
        cells = [f"{bench}, {case.removeprefix(f'{model}, ')}", f"{value['dense']:.1f} ms", f"{value['zipvl']:.1f} ms"]
        table.append("| " + " | ".join([*cells, f"{value['speedup']:.2f}x", *others, bound, kept]) + " |")
    return "\n".join([*table, "", f"{model}, keep_ratio 0.367. {source(rows)}"])


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
    value = {part: {name: line["value"] for name, line in metrics.items()} for (part, _, _), metrics in rows.items()}
    both, prefill = value["prefill and decode"], value["prefill"]
    return (
        f"Compiling prefill and decode with empty caches takes {both['zipvl']:.0f} s, {both['ratio']:.2f} times "
        f"Inductor's {both['dense']:.0f} s; prefill alone {prefill['ratio']:.2f} times. {source(rows)}"
    )


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


def frontier() -> str:
    """Return what every rule costs on each model: kept tokens, loss, points, cache and FLOPs."""
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
    for variant in VARIANTS:
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


def gpu() -> str:
    """Return the figures of prefill, decode and the kernels on a GPU."""
    rows = latest("gpu")
    found = {key: {name: line["value"] for name, line in metrics.items()} for key, metrics in rows.items()}
    table = [
        "| prefill | dense | dense without a mask | zipvl | over dense | over dense without a mask | bound | "
        "zipvl, every token kept, over dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (bench, case, _), m in found.items():
        if bench == "prefill":
            table.append(
                f"| {case} | {m['dense']:.0f} ms | {m['dense_causal']:.0f} ms | {m['zipvl']:.0f} ms | "
                f"{m['speedup_over_dense']:.2f}x | {m['speedup']:.2f}x | {m['bound']:.2f}x | "
                + (f"{m['exact_over_dense']:.2f}x |" if "exact_over_dense" in m else "|")
            )
    table += ["", "| decode step | dense | zipvl | over dense | over its own full cache | KV kept |"]
    table.append("|---|---|---|---|---|---|")
    for (bench, case, _), m in found.items():
        if bench == "decode":
            table.append(
                f"| {case} | {m['dense']:.1f} ms | {m['zipvl']:.1f} ms | {m['speedup']:.2f}x | "
                f"{m['over_full_cache']:.2f}x | {m['kv_bytes_kept']:.0%} |"
            )
    table += ["", "| kernel | | |", "|---|---|---|"]
    for (bench, case, variant), m in found.items():
        shape = case.split(", 40 heads")[0] if bench != "decode_attention" else case
        if bench == "sparse_attention" and variant.startswith("kept queries"):
            table.append(
                f"| attention, {shape}, {variant} | {m['rate']:.0f} TFLOP/s | {m['flops_vs_best_dense']:.0%} of the "
                "fastest dense attention of as many tokens |"
            )
        if bench == "selection" and variant.startswith("scores +") and "ratio" in case:
            table.append(
                f"| {variant}, {shape} | {m['time']:.2f} ms | {m['share_of_dense_attention']:.0%} of dense attention |"
            )
        if bench == "decode_attention" and variant == "triton":
            table.append(
                f"| decode attention, {shape} | {m['bandwidth']:.2f} TB/s | {m['bandwidth_vs_copy']:.0%} of a copy |"
            )
    return "\n".join([*table, "", f"keep_ratio 0.367; 40 heads, head_dim 128. {source(rows)}"])


TABLES = {
    "speed": speed, "never_slower": never_slower, "compile_time": compile_time, "frontier": frontier, "gpu": gpu,
    "rules": rules, "skipped_layers": skipped_layers, "pictures": pictures, "demo": demo,
}  # fmt: skip
PAGES = ("README.md", "docs/speed.md")


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
