"""The table of what GPUs were measured to take."""

from __future__ import annotations

from newest import latest, source


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
