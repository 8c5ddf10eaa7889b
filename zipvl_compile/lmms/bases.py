"""The model of lmms-eval for a Hugging Face checkpoint, by its model type."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

#: `model_type` of a configuration -> name in lmms-eval; those that load a Hugging Face class and call its `generate`.
BASES = {
    "aria": "aria",
    "fuyu": "fuyu",
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "glm4v": "glm4v",
    "glm4v_moe": "glm4v",
    "idefics2": "idefics2",
    "instructblip": "instructblip",
    "internvl": "internvl_hf",
    "lfm2_vl": "lfm2_5_vl",
    "llama4": "llama4_scout",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "mistral3": "mistral3_vl",
    "mllama": "llama_vision",
    "phi4_multimodal": "phi4_multimodal",
    "qwen2_5_omni": "qwen2_5_omni",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_omni_moe": "qwen3_omni",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "video_llava": "video_llava",
}
#: lmms-eval's model for whatever `AutoModelForImageTextToText` loads.
ANY = "huggingface"


def base_of(pretrained: Any, revision: str | None = None) -> str:
    """Return the name of lmms-eval's model for a checkpoint.

    Args:
        pretrained: local folder or name on the Hugging Face hub.
        revision: of the checkpoint on the hub.

    Raises:
        ValueError: no checkpoint given, or one without a configuration.
    """
    if pretrained is None:
        raise ValueError(
            "model_args 'pretrained': expected a local folder or a name on the Hugging Face hub, got none. Give it, or "
            "base=NAME to evaluate what lmms-eval's model of that name loads by default."
        )
    try:
        config, _ = PretrainedConfig.get_config_dict(pretrained, revision=revision)
        why = "no config.json with a model_type"
    except OSError as error:
        config, why = {}, str(error).strip().partition("\n")[0].rstrip(".")
    if "model_type" not in config:
        raise ValueError(
            f"model_args 'pretrained': expected a folder or a name on the hub with a config.json, got {pretrained!r} "
            f"({why}). Check the path or the name."
        )
    return BASES.get(config["model_type"], ANY)
