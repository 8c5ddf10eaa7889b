"""Every operator of this package: importing this module registers them all as `torch.ops.zipvl.*`."""

from __future__ import annotations

import importlib

import torch

OPERATORS = (
    "append_tokens",
    "decode_attention",
    "decode_attention_torch",
    "decode_quantised",
    "decode_quantised_torch",
    "fixed_rows",
    "gather_tokens",
    "held_rows",
    "hiding_rows",
    "kv_view",
    "note_queries",
    "other_tokens",
    "probe_rows",
    "quantise_tokens",
    "restore_tokens",
    "select_tokens",
    "sparse_attention",
    "to_host",
    "token_positions",
    "token_scores",
    "token_scores_torch",
    "window_attention",
    "with_room",
)

for _operator in OPERATORS:
    importlib.import_module(f"zipvl_compile.kernels.{_operator}")

ops = torch.ops.zipvl
