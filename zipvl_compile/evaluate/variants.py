"""What is compared: a name, and the options of the backend that it stands for.

One more row is one more line. A name is a family and a value, with a blank between them: the figure joins a family by a
line and writes the values beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zipvl_compile.options import ZipVLOptions

Options = Mapping[str, Any]
DENSE = "dense"
#: The one key that is no option of the backend: the side of the picture, as a fraction of its own, for the dense model.
PICTURE_SCALE = "picture_scale"

RATIOS = (0.7, 0.4, 0.2)


def _rows(name: str, options: Options, option: str, values: Iterable[float]) -> dict[str, Options]:
    """Return a rule at several budgets, which share one trace where they follow each other."""
    return {f"{name} {value}": {**options, option: value} for value in values}


UNION = {"policy": "union"}
SKIPPING = {"policy": "skip_layers"}
CODED = UNION | {"evict": "quantize"}
SECOND_HALF = {"skip": "layer", "skip_in": 0.5}
VARIANTS: dict[str, Options] = {
    DENSE: {},
    **_rows("paper", {"policy": "paper"}, "tau", (0.975, 0.9, 0.8)),
    **_rows("fixed ratio", {"policy": "fixed_ratio"}, "keep_ratio", RATIOS),
    **_rows("hold", {"policy": "hold"}, "tau", (0.975,)),
    **_rows("kept and window", {"policy": "window", "kept_window": True}, "tau", (0.99, 0.9)),
    **_rows("union", UNION, "tau", (0.99, 0.975, 0.95)),
    **_rows("union + fixed ratio", UNION, "keep_ratio", RATIOS),
    **_rows("union with the paper's scores", UNION | {"score": "normalised"}, "tau", (0.95,)),
    **_rows("union of each head", UNION | {"groups": "kv_head"}, "tau", (0.95,)),
    **_rows("union 0.95 + rest in bits", CODED | {"tau": 0.95}, "evict_bits", (8, 4, 2)),
    **_rows("union fixed 0.2 + rest in bits", CODED | {"keep_ratio": 0.2}, "evict_bits", (8, 4, 2)),
    **_rows("skip layers", SKIPPING, "tau", (0.99, 0.975)),
    **_rows("skip layers by twos", SKIPPING | {"score_every": 2}, "tau", (0.99,)),
    **_rows("skip layers by fours", SKIPPING | {"score_every": 4}, "tau", (0.99,)),
    **_rows("union then skip layers", UNION | SECOND_HALF, "tau", (0.99, 0.975)),
    **_rows("evict", {"policy": "paper", "prefill": "dense"}, "tau", (0.9,)),
    **_rows("snapkv", {"policy": "snapkv"}, "keep_ratio", (0.4,)),
    **_rows("heavy hitters", {"policy": "heavy_hitters"}, "keep_ratio", (0.4,)),
    **_rows("streaming", {"policy": "streaming"}, "keep_ratio", (0.4,)),
    **_rows("random", {"policy": "random_tokens"}, "keep_ratio", (0.4,)),
    **_rows("fastv", {"policy": "fastv"}, "keep_ratio", (0.5,)),
    "picture x 0.84": {PICTURE_SCALE: 0.84},
    "picture x 0.63": {PICTURE_SCALE: 0.63},
    "picture x 0.45": {PICTURE_SCALE: 0.45},
}
#: The variant that a preset is, for those who look for its figures.
OF_PRESETS = {
    "paper": "paper 0.975", "quality": "union 0.99", "balanced": "union 0.95", "fast": "union then skip layers 0.975",
}  # fmt: skip
QUICK = (DENSE, "paper 0.975", "union 0.99")


def chosen(names: Iterable[str] | None = None) -> dict[str, Options]:
    """Return the variants of these names, or all, "dense" first: every other one is compared with it.

    Raises:
        ValueError: an unknown name, or options that the backend does not take.
    """
    asked = list(VARIANTS if names is None else names)
    for name in asked:
        if name not in VARIANTS:
            raise ValueError(
                f"--variants: expected names among {', '.join(VARIANTS)}, got {name!r}. Separate them by commas."
            )
    table = {name: VARIANTS[name] for name in dict.fromkeys((DENSE, *asked))}
    for options in table.values():
        if PICTURE_SCALE not in options:
            ZipVLOptions.parse(options)
    return table


def family(name: str) -> str:
    """Return the part of a name before its value: "tau" of "tau 0.9"."""
    return name.rpartition(" ")[0] or name


def value(name: str) -> str:
    """Return the value in a name: "0.9" of "tau 0.9"; "" of "dense"."""
    return name.rpartition(" ")[2] if " " in name else ""
