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

VARIANTS: dict[str, Options] = {
    DENSE: {},
    "tau 0.99": {"tau": 0.99},
    "tau 0.975": {"tau": 0.975},
    "tau 0.9": {"tau": 0.9},
    "tau 0.8": {"tau": 0.8},
    "queries=all tau 0.99": {"tau": 0.99, "queries": "all"},
    "queries=all tau 0.975": {"tau": 0.975, "queries": "all"},
    "queries=all tau 0.9": {"tau": 0.9, "queries": "all"},
    "queries=all tau 0.8": {"tau": 0.8, "queries": "all"},
    "keep_ratio 0.7": {"keep_ratio": 0.7},
    "keep_ratio 0.4": {"keep_ratio": 0.4},
    "keep_ratio 0.2": {"keep_ratio": 0.2},
    "picture x 0.84": {PICTURE_SCALE: 0.84},
    "picture x 0.63": {PICTURE_SCALE: 0.63},
    "picture x 0.45": {PICTURE_SCALE: 0.45},
}
QUICK = (DENSE, "tau 0.975", "keep_ratio 0.4")


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
