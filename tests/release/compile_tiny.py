"""Run by `make test-dist` where only the wheel is installed: the backend is found by name, and keeps fewer tokens."""

from __future__ import annotations

import sys

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

IMAGE, IMAGE_TOKENS, OPTIONS = 5, 64, {"min_tokens": 0, "tau": 0.8}
TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=IMAGE_TOKENS,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def main() -> None:
    torch.manual_seed(0)
    text = torch.randint(6, 128, (1, 40))
    picture = torch.cat([torch.full((1, IMAGE_TOKENS), IMAGE), text], 1)
    pixels = torch.randn(1, 3, 64, 64)
    wide = [llava(), LlamaForCausalLM(LlamaConfig(**TEXT)).eval()]
    for model in wide:
        for weight in model.parameters():  # wider than by default, so that attention is not even
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.15)
    assert not any(name.startswith("zipvl_compile") for name in sys.modules)

    wide[0].compile(backend="zipvl", options=OPTIONS)
    asked = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    out = wide[0].generate(input_ids=picture, pixel_values=pixels, **asked)

    import zipvl_compile  # only to ask what was kept

    assert "site-packages" in zipvl_compile.__file__, zipvl_compile.__file__
    check("LLaVA", picture.shape[1], out, zipvl_compile.kept_tokens(out))

    compiled = torch.compile(wide[1], backend="zipvl", options=OPTIONS)
    out = compiled(input_ids=text, use_cache=True)
    check("Llama", text.shape[1], out, zipvl_compile.kept_tokens(out))


def check(name: str, prompt: int, out: object, kept: list[torch.Tensor | None]) -> None:
    counts = [0 if positions is None else int((positions < prompt).sum()) for positions in kept]
    print(f"{name}: kept {counts} of {prompt} tokens, {type(out).__name__}")
    assert len(counts) == TEXT["num_hidden_layers"] and all(0 < count < prompt for count in counts)


if __name__ == "__main__":
    main()
