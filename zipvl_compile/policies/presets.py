"""What to use if one does not want to choose: options by name of a preset.

Fixed on the documents and questions of `zipvl eval --split choose`. There, of SmolLM2-135M with 1,024 tokens, the
loss against dense (nats) and the kept tokens: paper +.286 at 73%, quality -.000 at 80%, balanced +.005 at 67%, fast
+.054 at 40%.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"policy": "paper"},
    "quality": {"policy": "window", "tau": 0.99, "kept_window": True},
    "balanced": {"policy": "window", "tau": 0.975, "kept_window": True},
    "fast": {"policy": "window", "tau": 0.9},
}
DEFAULT = "paper"
