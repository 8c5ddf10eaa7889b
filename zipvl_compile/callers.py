"""What those who call a compiled graph read of the hidden state that it gives them.

A graph break between a decoder and its head leaves the head in another graph. What it will read stands in the frame
that runs both: transformers calls it `logits_to_keep`, 1 in `generate`, more in assisted decoding, 0 for all logits.

    generate -> LlavaForConditionalGeneration.forward(logits_to_keep=1) -> LlavaModel.forward -> the graph
"""

from __future__ import annotations

import sys

from zipvl_compile.dynamo import recompile_unless

NAME = "logits_to_keep"


def newest_row_only() -> bool:
    """Return whether the callers of the graph that is being compiled read its newest row only.

    Dynamo compiles another graph for callers that read other rows. Where no frame says what is read, all of it is.
    """
    newest = _asked_for_the_newest()
    return recompile_unless(lambda: _asked_for_the_newest() is newest, f"{NAME} of the caller") and newest


def _asked_for_the_newest() -> bool:
    """Return whether the innermost `forward` on the stack that has `logits_to_keep` was given 1."""
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        # Dynamo runs what follows a graph break as a function of its own, `torch_dynamo_resume_in_forward_at_...`.
        if NAME in code.co_varnames and (code.co_name == "forward" or "_in_forward_at_" in code.co_name):
            kept = frame.f_locals.get(NAME)
            return type(kept) is int and kept == 1
        frame = frame.f_back  # type: ignore[assignment]
    return False
