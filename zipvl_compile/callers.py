"""What those who call a compiled graph read of the hidden state that it gives them.

A graph break between a decoder and its head leaves the head in another graph. What it will read stands in the frame
that runs both: transformers calls it `logits_to_keep`, 1 in `generate`, more in assisted decoding, 0 for all logits.

    generate -> LlavaForConditionalGeneration.forward(logits_to_keep=1) -> LlavaModel.forward -> the graph
"""

from __future__ import annotations

import sys
from typing import Any

from zipvl_compile.dynamo import recompile_unless

LOGITS_TO_KEEP = "logits_to_keep"
COUNTS = (1, 16, 64, 256)  # of newest rows; a graph is compiled for each that is met


def newest_rows_read() -> int:
    """Return how many of the newest rows the callers of the graph that is being compiled read at most; 0 is all rows.

    Dynamo compiles another graph for callers that read more, or fewer. Where no frame says what is read, all rows are.
    """
    count = _count(_asked())
    return count if recompile_unless(lambda: _count(_asked()) == count, f"{LOGITS_TO_KEEP} of the caller") else 0


def decoder_layers() -> int | None:
    """Return how many layers the decoder has whose graph is being compiled, as the frames that call it know its config.

    A graph break between two layers makes the hidden state an output, too, of which all rows are read.
    """
    frame = sys._getframe()
    while frame is not None:
        config: Any = getattr(frame.f_locals.get("self"), "config", None)
        if hasattr(config, "get_text_config"):
            try:
                count = getattr(config.get_text_config(), "num_hidden_layers", None)
            except ValueError:  # several
                count = None
            return count if type(count) is int else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def attention_switch() -> str | None:
    """Return the `attn_implementation` of the innermost model on the stack; None where none has one."""
    frame = sys._getframe()
    while frame is not None:
        found = getattr(getattr(frame.f_locals.get("self"), "config", None), "_attn_implementation", None)
        if isinstance(found, str):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _count(asked: Any) -> int:
    if type(asked) is not int or asked < 1:
        return 0
    return next((count for count in COUNTS if asked <= count), 0)


def _asked() -> Any:
    """Return the `logits_to_keep` of the innermost `forward` on the stack that has it; None where none has."""
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        # Dynamo runs what follows a graph break as a function of its own, `torch_dynamo_resume_in_forward_at_...`.
        if LOGITS_TO_KEEP in code.co_varnames and (code.co_name == "forward" or "_in_forward_at_" in code.co_name):
            return frame.f_locals.get(LOGITS_TO_KEEP)
        frame = frame.f_back  # type: ignore[assignment]
    return None
