"""What `zipvl calibrate` reads and shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from zipvl_compile.demo.prompts import load, prompt_inputs, read_image
from zipvl_compile.evaluate.calibrate import Calibration, calibrate

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def asked(data: Path, prompt: str, most: int) -> list[tuple[Path, str]]:
    """Return pictures and what to ask of them.

    Args:
        data: folder of pictures, or a file with lines of `{"image": path, "question": text}`.
        prompt: for the pictures of a folder.
        most: of them, from the first in order of their names.

    Raises:
        ValueError: no such folder or file, no picture in it, or a line of another form.
    """
    if data.is_dir():
        found = [(path, prompt) for path in sorted(data.iterdir()) if path.suffix.lower() in PICTURES]
        if not found:
            raise ValueError(f"--data: expected pictures in a folder, got none in {str(data)!r}. Name another one.")
        return found[:most]
    if not data.is_file():
        raise ValueError(f"--data: expected a folder of pictures or a file, got {str(data)!r}. Check the path.")
    lines = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()][:most]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append((data.parent / row["image"], str(row["question"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'--data: expected {{"image": path, "question": text}} in line {number} of {data}, got {line[:80]!r} '
                f"({error!r}). Correct the line."
            ) from error
    if not rows:
        raise ValueError(f"--data: expected at least one line, got none in {str(data)!r}. Add pictures.")
    return rows


def run(
    console: Console, model: str, data: Path, prompt: str, options: Mapping[str, Any], target: float, most: int,
    device: str | None, output: Path,
) -> None:  # fmt: skip
    """Calibrate, show what each layer costs, and write the file."""
    pictures = asked(data, prompt, most)
    with console.status(f"loading {model}") as status:
        loaded, processor = load(model, device)
        prompts = [prompt_inputs(processor, read_image(path), text, loaded.device) for path, text in pictures]
        found = calibrate(loaded, prompts, options, target, status.update)
    found.write(output)
    console.print(table(found))
    console.print(
        f"KL of what is chosen: {found.cost:.4f} nats (target {target}) with {found.kept:.1%} of the prompt in the "
        f"cache and {found.flops:.1%} of the prefill's FLOPs.\n"
        f'options={{"calibration": "{output}"}}   or   options={found.options}',
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def table(found: Calibration) -> Table:
    """Return what each layer costs and saves, as a table."""
    rows = Table(title=f"What one layer that selects costs and saves, {found.prompts} prompts", title_justify="left")
    for name in ("layer", "others skip", "KL alone, nats", "FLOPs saved", "cache saved", "chosen"):
        rows.add_column(name, justify="right")
    for one in sorted(found.choices, key=lambda one: (one.layer, one.skip)):
        saved = f"{one.flops:.1%}", f"{one.tokens:.1%}"
        rows.add_row(str(one.layer), one.skip, f"{one.cost:.5f}", *saved, "yes" if one.chosen else "no")
    return rows
