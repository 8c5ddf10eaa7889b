"""What to use if one does not want to choose: options by name of a preset.

Fixed on documents of `zipvl eval --split choose`, of 1,024 tokens each. Loss against dense in nats, kept tokens of the
layers that select, and how many documents:

               SmolLM2-135M         Gemma 3 270M
    paper      +.286 at 73%, 6      +.006 at 68%, 6
    quality    +.006 at 79%, 12     -.001 at 82%, 12
    balanced   +.037 at 50%, 12     +.009 at 58%, 12
    fast       +.121 at 63%, 12     +.002 at 73%, 12

The default stays below +.02 on both, there and on the documents to report (README). `fast` computes a quarter less of
SmolLM2's prefill than dense, where `balanced` computes a tenth less: tokens pass whole layers in the second half of
the decoder, so that short prompts gain, too. At tau 0.99 that lost +.048 and -.001, and the policy `skip_layers`, from
the second quarter of the layers on, +.068 and +.040.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"policy": "paper"},
    "quality": {"policy": "union", "tau": 0.99},
    "balanced": {"policy": "union", "tau": 0.95},
    "fast": {"policy": "union", "tau": 0.975, "skip": "layer", "skip_in": 0.5},
}
DEFAULT = "quality"
