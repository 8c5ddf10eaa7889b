"""The picture of `zipvl explain --output`: what the layers keep of the prompt that was explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from zipvl_compile.demo.compare import compiled_copy
from zipvl_compile.demo.media import Video
from zipvl_compile.demo.plots import draw_kept
from zipvl_compile.report.compile_report import left_dense
from zipvl_compile.report.explanation import Explanation


def draw_explained(
    output: Path,
    explanation: Explanation,
    model: Any,
    processor: Any,
    inputs: Mapping[str, torch.Tensor],
    prompt: str,
    options: Mapping[str, Any],
    images: Sequence[Image.Image] = (),
    videos: Sequence[Video] = (),
) -> None:
    """Generate one token, and draw what each layer keeps of the prompt; why a prompt stays dense is said there.

    Args:
        output: the picture to write.
        explanation: of the same prompt.
        model: not compiled; it stays as it is.
        processor: that made `inputs`.
        inputs: of the prompt, batch 1.
        prompt: the question in it.
        options: of the backend.
        images: of the prompt, RGB.
        videos: of the prompt.

    Raises:
        ValueError: no layer of which a part could be kept.
    """
    compiled = compiled_copy(model, options, "eager")
    out = compiled.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1, return_dict_in_generate=True)
    dense = left_dense(site.reason for site in explanation.rows)
    prefill = [site for site in explanation.rows if site.kind == "prefill"]
    rewritten = sum(site.reason is None for site in prefill)
    lines = [
        f"prompt: {prompt}",
        f"zipvl rewrote {rewritten} of the {len(prefill)} attentions that read this prompt in the decoder.",
        dense[0].upper() + dense[1:] if dense else "",
    ]
    draw_kept(output, model, processor, inputs, out, images, [video.frames for video in videos], lines)
