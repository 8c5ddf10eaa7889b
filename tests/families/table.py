"""Write docs/models.md from the results that `make test-models` left in build/families."""

from __future__ import annotations

import json
import platform
from collections import Counter
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[2]
HEAD = """# Families of models

What zipvl does to the attention of {families} families of Hugging Face vision-language models, {classes} model classes.
Made by `make test-models` from tiny random models (2 to 4 decoder layers), not from trained ones: it shows which
attention is rewritten and that nothing changes at `tau=1`, not how well a model answers.

- **rewritten**: decoder attention sites that became sparse prefill over a compacted cache.
- **dense**: decoder attention sites that did not, and why.
- **outside**: sites of vision towers, Q-Formers and encoders, which stay as they are.
- **exact**: at `tau=1`, logits of a direct forward within 1e-4 of eager, greedy tokens of a generate, and of a padded
  batch of two, equal to eager's.
- **kept**: tokens of the prompt that each compacted cache layer keeps at `tau=0.9`, by the paper's rule.

| family | class | rewritten | dense, and why | outside | cache layers | exact | kept |
|---|---|---|---|---|---|---|---|
"""


def row(result: dict) -> str:
    dense = "; ".join(f"{count} x {reason}" for reason, count in result["dense"].items())
    layers = ", ".join(f"{count} x {name}" for name, count in Counter(result["cache_layers"]).items())
    exact = ", ".join(name if same else f"**{name}: no**" for name, same in result["exact"].items())
    kept = ", ".join(f"{share:.0%}" for share in result["kept"] if share is not None)
    cells = (
        result["family"], f"`{result['model']}`", str(result["rewritten"]), dense, str(result["outside"]), layers,
        exact, kept,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "build" / "families").glob("*.json"))]
    head = HEAD.format(families=len(results), classes=len({result["model"] for result in results}))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()} CPU"
    (ROOT / "docs").mkdir(exist_ok=True)
    rows = "\n".join(map(row, results))
    (ROOT / "docs" / "models.md").write_text(f"{head}{rows}\n\nMeasured with {versions}.\n")


if __name__ == "__main__":
    main()
