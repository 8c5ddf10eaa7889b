"""The frontier as a picture: quality gained or lost against the KV bytes and FLOPs that are left, in rows of panels."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zipvl_compile.evaluate.results import Rows
from zipvl_compile.evaluate.variants import DENSE, family, value

FIGURE = "frontier.png"
COLUMNS = {"kv_bytes_of_dense": "KV cache, % of dense", "prefill_flops_of_dense": "FLOPs of the prefill, % of dense"}


class Quality(NamedTuple):
    """A metric to draw: what it is called, and by how much it is multiplied; better is up."""

    metric: str
    label: str
    factor: float


QUALITIES = (
    Quality("nll_minus_dense", "dense NLL minus NLL (nats),\nup is better", -1),
    Quality("rep_nll_minus_dense", "the same for a repeated passage,\nup is better", -1),
    Quality("accuracy_single_token_minus_dense", "single-token answers,\npoints gained over dense", 100),
    Quality("accuracy_multi_token_minus_dense", "multi-token answers,\npoints gained over dense", 100),
    Quality("accuracy_minus_dense", "answers, points gained over dense", 100),
)
MARKERS = "osD^vP*X<>hp"


def draw(path: Path, rows: Rows) -> None:
    """Write a PNG with a row of panels for every case and quality, joined by family, with one standard error.

    Args:
        path: of the picture.
        rows: see `Rows`.
    """
    panels = [(case, quality) for case in dict.fromkeys(case for case, _ in rows) for quality in _qualities(rows, case)]
    families = list(dict.fromkeys(family(variant) for _, variant in rows if variant != DENSE))
    size = (13, 3.6 * len(panels) + 0.6 + 0.25 * (len(families) // 4))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), len(COLUMNS), squeeze=False)
    for row, (case, quality) in zip(axes, panels, strict=True):
        for axis, (cost, label) in zip(row, COLUMNS.items(), strict=True):
            _draw_panel(axis, rows, case, quality, cost, families)
            axis.set_xlabel(label)
        row[0].set_ylabel(quality.label)
        row[0].set_title(case, fontsize=10, loc="left", parse_math=False)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    FigureCanvasAgg(figure)  # no global backend, no display
    figure.savefig(path, dpi=110)


def _qualities(rows: Rows, case: str) -> list[Quality]:
    """Return what to draw of a case; accuracy over all answers only where they are not told apart by length."""
    known = {metric for (of, _), values in rows.items() if of == case for metric in values}
    found = [quality for quality in QUALITIES if quality.metric in known]
    return found[:2]


def _draw_panel(axis, rows: Rows, case: str, quality: Quality, cost: str, families: list[str]) -> None:
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.plot(100, 0, "k+", markersize=12, label=DENSE)
    for index, name in enumerate(families):
        points = []
        for (of, variant), values in rows.items():
            if of == case and variant != DENSE and family(variant) == name and quality.metric in values:
                error = quality.factor * values.get(f"{quality.metric}_se", 0.0)
                points.append((100 * values[cost], quality.factor * values[quality.metric], abs(error), value(variant)))
        if not points:
            continue
        x, y, errors, names = zip(*sorted(points), strict=True)
        style = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)], "label": name}
        axis.errorbar(x, y, yerr=errors, capsize=2, linewidth=1, markersize=5, **style)
        for at_x, at_y, text in zip(x, y, names, strict=True):
            axis.annotate(
                text,
                (at_x, at_y),
                (4, 4),
                textcoords="offset points",
                fontsize=7,
                color=style["color"],
                parse_math=False,
            )
    axis.grid(alpha=0.3)
