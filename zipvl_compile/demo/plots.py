"""Which tokens of a prompt each decoder layer kept, as a picture: over the images, as bars, and for the text."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from zipvl_compile.cache.kept_tokens import kept_tokens
from zipvl_compile.demo.layout import Layout, layout_of
from zipvl_compile.demo.media import evenly
from zipvl_compile.demo.plot_charts import TEXT, VISUAL, Bars, Strip
from zipvl_compile.demo.plot_parts import WIDTH, Enlarged, Header, Views
from zipvl_compile.report.stats import stats

#: Most panels beside each other, and most layers that are drawn; the bars show all layers.
MOST_PANELS, MOST_LAYERS = 8, 8
DOTS_PER_INCH = 100


@dataclass(frozen=True)
class Kept:
    """What a KV cache holds of one prompt.

    Attributes:
        layers: kept prompt positions of each layer, ascending, int64 `[P]`, or `[G, P]` where groups of heads select on
            their own; None for layers of another kind.
        kinds: of each layer, for people: "sliding window", ...
        bytes_used: of the KV cache.
        bytes_dense: that it would take with every token, or what dense took.
    """

    layers: Sequence[torch.Tensor | None]
    kinds: Sequence[str]
    bytes_used: int
    bytes_dense: int


def draw_kept(
    path: str | Path,
    model: Any,
    processor: Any,
    inputs: Mapping[str, torch.Tensor],
    cache: Any,
    images: Sequence[Image.Image] = (),
    videos: Sequence[Sequence[Image.Image]] = (),
    lines: Sequence[str] = (),
) -> Figure:
    """Draw which tokens of a prompt each layer kept, and write the picture.

    out = model.generate(**inputs, return_dict_in_generate=True)
    draw_kept("kept.png", model, processor, inputs, out, images=[image])

    Every image and every video frame has a panel, as it is and once for every layer, with the parts that the layer
    dropped pale and hatched; at most 8 panels and 8 layers, evenly chosen. Images that the processor cuts into tiles
    are put together again, or have a panel for every tile. Below are the kept share of every layer, as bars, and the
    text tokens that it kept. Tokens whose place in an image is not known have a strip instead of panels.

    Args:
        path: .png, .pdf or .svg; PNG is 1200 pixels wide.
        model: that read the prompt; its config says where images are.
        processor: that made `inputs`.
        inputs: of the prompt, batch 1: `input_ids [1, n]`, pixels, grids.
        cache: of transformers, or an output that has one, with the prompt read.
        images: of the prompt, RGB, in order. Models of flat patches (Qwen-VL, GLM-V) need them to be seen; of others
            what the model sees is drawn.
        videos: for each video, the frames that the processor took.
        lines: of text below the title, such as question and answer.

    Returns:
        The figure.

    Raises:
        TypeError: no cache.
        ValueError: more than one prompt, or no layer of which a part could be kept.
    """
    held = stats(cache)
    n = inputs["input_ids"].shape[1]
    layers = [None if p is None else p[0][:, p[0, 0] < n].cpu() for p in kept_tokens(cache)]
    kinds = [layer.why_dense for layer in held.layers]
    if any(one is not None and len(one) > 1 for one in layers):
        lines = [*lines, "Every KV head keeps tokens of its own; half pale: some of the heads keep it."]
    if any(layer.bits for layer in held.layers):
        lines = [*lines, f"What is left out is held at {max(layer.bits for layer in held.layers)} bits."]
    if held.bytes_on_host:
        lines = [*lines, f"What is left out is held in host memory: {_bytes(held.bytes_on_host)}."]
    kept = Kept(layers, kinds, held.bytes_used, held.bytes_dense)
    figure = kept_figure(layout_of(model.config, processor, inputs, images, videos), kept, lines)
    save(figure, Path(path))
    return figure


def kept_figure(layout: Layout, kept: Kept, lines: Sequence[str] = (), cells: Sequence[tuple[int, int]] = ()) -> Figure:
    """Return the picture of `draw_kept`.

    Args:
        layout: of the prompt.
        kept: of its tokens.
        lines: below the title.
        cells: row and column of tokens of the first panel to enlarge.

    Raises:
        ValueError: no layer of which a part could be kept.
    """
    known = {n: positions for n, positions in enumerate(kept.layers) if positions is not None}
    if not known:
        raise ValueError("cache: expected layers of which zipvl keeps a part, got none. See zipvl_compile.explain.")
    panels = [layout.panels[i] for i in evenly(len(layout.panels), MOST_PANELS)] if layout.panels else []
    layers = {list(known)[i]: known[list(known)[i]] for i in evenly(len(known), MOST_LAYERS)}
    notes = []
    if len(panels) < len(layout.panels):
        kinds = "video frames" if all("frame" in panel.name for panel in layout.panels) else "images, tiles and frames"
        notes.append(f"{len(panels)} of {len(layout.panels)} panels of {kinds} shown, evenly chosen")
    if len(layers) < len(known) and panels:
        notes.append(f"{len(layers)} of {len(known)} layers shown over the images, evenly chosen; the bars show all")
    text = "; ".join(notes)
    parts: list[Header | Views | Enlarged | Bars | Strip] = [
        Header(_title(layout, kept, known), [*lines, text and text[0].upper() + text[1:] + "."], bool(panels))
    ]
    if panels:
        parts.append(Views(panels, layers, layout.length, cells))
    if panels and cells:
        parts.append(Enlarged(panels[0], known, cells))
    parts.append(Bars(layout, kept.layers, kept.kinds))
    if layout.unplaced.numel():
        said = "image and video tokens that each layer keeps (where they lie in the picture is not known of this model)"
        parts.append(Strip(said, layout.unplaced, [], known, VISUAL))
    if layout.text.numel():
        parts.append(Strip("text tokens that each layer keeps (in blue)", layout.text, layout.words, known, TEXT))
    figure = Figure(figsize=(WIDTH, sum(part.height for part in parts)), dpi=DOTS_PER_INCH)
    top = 0.0
    for part in parts:
        part.draw(figure, top)
        top += part.height
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure, and make its folder where there is none."""
    # The Agg canvas is made here, so that no global backend is chosen and no display is needed.
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # tokens of any script; a box is drawn
        figure.savefig(path, dpi=DOTS_PER_INCH)


def _title(layout: Layout, kept: Kept, known: Mapping[int, torch.Tensor]) -> str:
    share = mean(positions.shape[-1] for positions in known.values()) / layout.length
    over = f"{len(known)} layers" if len(known) > 1 else "one layer"
    if share == 1:
        return f"Every layer keeps all {layout.length:,} tokens of this prompt: {_bytes(kept.bytes_used)} of KV cache"
    less = f" ({kept.bytes_used / kept.bytes_dense:.0%})" if kept.bytes_dense else ""
    return (
        f"zipvl keeps {share:.0%} of this prompt's {layout.length:,} tokens (mean of {over}): "
        f"{_bytes(kept.bytes_used)} of KV cache instead of {_bytes(kept.bytes_dense)}{less}"
    )


def _bytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
