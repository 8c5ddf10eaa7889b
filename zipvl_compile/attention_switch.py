"""`attention=` of `zipvl_compile.compile`: set the attention switch of transformers to one that zipvl reads.

    model.config._attn_implementation = "flash_attention_2"     a call into a library, which no pass reads
                                        "flex_attention"        functions for a mask, not tensors
                                        "sdpa", "eager"         operations that the passes read

Every model within a model has a switch of its own. Parts that do not have the one that is asked for keep theirs, such
as vision towers of convolutions; a decoder that does not is an error, and nothing is set then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ = ("sdpa", "eager")


def check(attention: object) -> None:
    """Raise ValueError where `attention` is neither None nor a switch that zipvl reads."""
    if attention is not None and attention not in READ:
        raise ValueError(
            f'attention: expected None, "sdpa" or "eager", which zipvl reads, got {attention!r}. Use "sdpa", or None '
            "for the switch that the model was loaded with."
        )


def switch(model: torch.nn.Module, decoders: list[torch.nn.Module], attention: str) -> None:
    """Set the attention of all models within `model`, in place.

    Args:
        model: a Hugging Face model, or a module around one.
        decoders: modules of it whose attention must be the one that is asked for.
        attention: one of `READ`.

    Raises:
        ValueError: a decoder cannot be switched to it, or is no Hugging Face model.
    """
    # Takes seconds, and prints what optional libraries say when they load, torchao above all.
    from transformers import PreTrainedModel

    parts: dict[int, PreTrainedModel] = {}  # by config, which several models may share
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            parts.setdefault(id(part.config), part)
    refused = {key: reason for key, part in parts.items() if (reason := _refusal(part, attention))}
    for decoder in decoders:
        if not isinstance(decoder, PreTrainedModel):
            raise ValueError(
                f"attention: expected None for {type(decoder).__name__}, which is no Hugging Face model and has no "
                f"switch, got {attention!r}. Leave it out."
            )
        key = id(decoder.config.get_text_config(decoder=True))
        if key in refused:
            raise ValueError(
                f"attention: expected one that {type(parts[key]).__name__} has, got {attention!r}: {refused[key]}. "
                "Leave attention out; zipvl_compile.explain(model, **inputs) says whether what it has is rewritten."
            )
    for key, part in parts.items():
        if key not in refused and part.config._attn_implementation != attention:
            part.set_attn_implementation({"": attention})


def _refusal(part: PreTrainedModel, attention: str) -> str:
    """Return why the attention of one model cannot be switched, or an empty string."""
    if part.config._attn_implementation == attention:
        return ""
    if not part._can_set_attn_implementation():
        return "transformers cannot switch its attention"
    try:
        part.get_correct_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        return str(error).partition(". ")[0].rstrip(".")
    return ""
