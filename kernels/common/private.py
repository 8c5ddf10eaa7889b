"""Every private name of PyTorch that the operators use."""

from __future__ import annotations

import torch

# What scaled_dot_product_attention calls on a CPU, which drops the log-sum-exp that this gives besides.
FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Where it warns, of every `triton_op`, that there is no Triton.
LOGGER_OF_TRITON_OPS = "torch._library.triton"
