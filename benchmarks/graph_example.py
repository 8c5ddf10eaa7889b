"""A decoder of two layers before and after the passes: `python benchmarks/graph_example.py`; docs/how-it-works.md."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

TOKENS, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 256, 32, 4, 2, 8


class Layer(nn.Module):
    """Attention as models write it, with a residual connection."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False) for _ in range(2))

    def forward(self, x: Tensor, cache: DynamicCache) -> Tensor:
        """Map `[B, n, width]` to the same shape; the cache takes K and V."""
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = cache.update(k, v, self.number)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.o(attended.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Two layers, of which the newest row is read, as `generate` reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(0), Layer(1)])

    def forward(self, embedded: Tensor, cache: DynamicCache) -> Tensor:
        """Map `[B, n, width]` to `[B, 1, width]`."""
        x = embedded
        for layer in self.layers:
            x = layer(x, cache)
        return x[:, -1:]


def graphs(**options: object) -> tuple[str, str]:
    """Return the graph of a prompt before the first pass and after the last one, as `ZIPVL_DUMP` writes them."""
    torch.compiler.reset()
    config = LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS
    )
    before = os.environ.get("ZIPVL_DUMP")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ZIPVL_DUMP"] = folder
        try:
            run = torch.compile(Decoder(), backend="zipvl", options={"inner": "eager", "min_tokens": 0, **options})
            with torch.no_grad():
                run(torch.ones(1, TOKENS, WIDTH), DynamicCache(config=config))
        finally:
            os.environ.pop("ZIPVL_DUMP")
            if before is not None:
                os.environ["ZIPVL_DUMP"] = before
        written = [path.read_text() for path in sorted(Path(folder).rglob("*.py"))]
    return readable(written[0]), readable(written[-1])


def readable(code: str) -> str:
    """Return a dumped graph with short names, without comments, releases of memory and copies of its inputs.

    Symbols of sizes are counted anew: how many came before them is another number in every process.
    """
    code = re.sub(r";  [\w =]+ = None$", "", code, flags=re.M)
    code = re.sub(
        r"[lL]_(?:self_modules_)?(\w+?)_(?=\W)", lambda name: re.sub("_(modules|parameters)", "", name[1]), code
    )
    code = re.sub(r"(torch\.ops\.zipvl\.\w+)\.default", r"\1", code)
    code = code.replace("slice(None, None, None)", ":").replace("slice(-1, None, None)", "-1:").replace("[(", "[")
    code = code.replace(")]\n", "]\n")
    lines = [line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
    head, *body = [line for line in lines if not re.fullmatch(r" *(\w+) = \1", line)]
    inputs = ", ".join(re.findall(r"(\w+): ", head))
    code = "\n".join([f"def forward(self, {inputs}):", *body])
    symbols = {name: f"s{i}" for i, name in enumerate(dict.fromkeys(re.findall(r"\bs\d+\b", code)))}
    return re.sub(r"\bs\d+\b", lambda name: symbols[name[0]], code)


def versions() -> str:
    """Return what names of nodes depend on."""
    torch_version, python = torch.__version__.partition("+")[0], ".".join(map(str, sys.version_info[:2]))
    return f"torch {torch_version}, transformers {transformers.__version__}, Python {python}."


def page() -> str:
    """Return both graphs by default, and the later one by the paper's rule, as Markdown."""
    before, after = graphs()
    _, paper = graphs(preset="paper")
    shown = (
        ("Before the passes", before),
        ("After them, with default options", after),
        ('With `preset="paper"`', paper),
    )
    parts = [f"{title}:\n\n```python\n{code}\n```\n" for title, code in shown]
    return "\n".join([*parts, versions()])


if __name__ == "__main__":
    print(page())
