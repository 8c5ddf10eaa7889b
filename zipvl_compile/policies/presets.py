"""What to use if one does not want to choose: options by name of a preset."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"policy": "paper"},
    "quality": {"policy": "window", "tau": 0.975, "floor": 0.4, "kept_window": True},
    "balanced": {"policy": "window", "tau": 0.9, "floor": 0.3},
    "fast": {"policy": "hold", "tau": 0.8, "floor": 0.25},
}
DEFAULT = "paper"
