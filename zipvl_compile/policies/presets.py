"""What to use if one does not want to choose: options by name of a preset.

Fixed on the documents of `zipvl eval --split choose`, 12 of 1,024 tokens each (`paper` and `fast`: 6). Loss against
dense in nats, and kept tokens of the layers that select:

               SmolLM2-135M     Gemma 3 270M
    paper      +.286 at 73%     +.006 at 68%
    quality    +.006 at 81%     -.003 at 82%
    balanced   +.028 at 55%     +.006 at 57%
    fast       +.020 at 38%     +.033 at 43%

The default is the one that stays below +.02 on both, also on other documents, and below half a point on pictures.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"policy": "paper"},
    "quality": {"policy": "union", "tau": 0.99},
    "balanced": {"policy": "union", "tau": 0.95},
    "fast": {"policy": "window", "tau": 0.9, "kept_window": True},
}
DEFAULT = "quality"
