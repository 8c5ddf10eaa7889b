"""What to use if one does not want to choose: options by name of a preset.

Fixed on the documents and questions of `zipvl eval --split choose`: 6 documents of 1,024 tokens, loss against dense in
nats, and kept tokens of the layers that select.

               SmolLM2-135M     Gemma 3 270M
    paper      +.286 at 73%     +.006 at 68%
    quality    -.000 at 80%     +.001 at 82%
    balanced   +.005 at 55%     +.006 at 57%
    fast       +.020 at 38%     +.033 at 43%
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"policy": "paper"},
    "quality": {"policy": "window", "tau": 0.99, "kept_window": True},
    "balanced": {"policy": "union", "tau": 0.95},
    "fast": {"policy": "window", "tau": 0.9, "kept_window": True},
}
DEFAULT = "balanced"
