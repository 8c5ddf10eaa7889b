"""The compacted cache seen at its logical length, a tensor that only tracing needs.

A traced model expects keys and values of `n` logical tokens. `kv_view` gives Dynamo such a shape; the decode pass then
rewrites every attention that reads it into `decode_attention`, which reads the physical buffer. A view that some
other code reads is computed where no token was dropped, and is an error, never a wrong answer, elsewhere.
"""

from __future__ import annotations

import torch

UNREADABLE = (
    "zipvl: this KV cache keeps only the important prompt tokens, and an attention that zipvl did not rewrite tried to "
    "read it as a full cache. {why} Remedies: run the whole generation through the same compiled model "
    "(model.compile(backend='zipvl')), or compile with options={{'evict': 'keep'}} to keep the full cache. "
    "zipvl_compile.explain(model, **inputs) lists the attention that stays dense and why."
)


@torch.library.custom_op("zipvl::kv_view", mutates_args=())
def _kv_view(
    buffer: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int, held: torch.Tensor | None = None,
    codes: torch.Tensor | None = None, scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    if held is not None:
        stands = int(positions[0, 0, int(held) - 1])
        if stands != int(held) - 1:
            raise RuntimeError(UNREADABLE.format(why=f"It holds {int(held)} of {stands + 1} tokens."))
        return buffer[:, :, :n].clone()
    if positions.shape[2] != prompt_length:
        raise RuntimeError(UNREADABLE.format(why=f"It holds {positions.shape[2]} of {prompt_length} prompt tokens."))
    return buffer[:, :, :n].clone()


@_kv_view.register_fake
def _(buffer, positions, prompt_length, n, held=None, codes=None, scales=None):
    return buffer.new_empty(buffer.shape[0], buffer.shape[1], n, buffer.shape[3])


def kv_view(
    buffer: torch.Tensor, positions: torch.Tensor, prompt_length: int, n: int, held: torch.Tensor | None = None,
    codes: torch.Tensor | None = None, scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return a cache buffer at its logical length.

    Args:
        buffer: keys or values `[B, Hkv, capacity, D]`: kept prompt tokens, then every later token.
        positions: int64 `[B, G, P]`, where the kept prompt tokens stood.
        prompt_length: in tokens.
        n: logical length, prompt and later tokens.
        held: int64 `[]`, how many tokens the buffer holds, where only the device knows it; `positions` is then of every
            row, `[B, G, capacity]`, and `n` and `prompt_length` are the most tokens that there may be.
        codes, scales: the other prompt tokens, see `quantise_tokens`, where the layer holds them so.

    Returns:
        `[B, Hkv, n, D]`, a copy.

    Raises:
        RuntimeError: tokens were dropped, so that no tensor of that length exists.
    """
    return torch.ops.zipvl.kv_view(buffer, positions, prompt_length, n, held, codes, scales)
