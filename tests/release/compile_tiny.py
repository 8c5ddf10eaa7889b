"""Run by `make test-dist` where only the wheel is installed: the backend is found by name, and keeps fewer tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import tiny_llama, tiny_llava

del sys.path[0]  # there, tests/zipvl_compile would hide the package

OPTIONS = {"min_tokens": 0, "tau": 0.8}


def main() -> None:
    assert not any(name.startswith("zipvl_compile") for name in sys.modules)

    llava, picture = tiny_llava.model(), tiny_llava.inputs(text=40)
    llava.compile(backend="zipvl", options=OPTIONS)
    out = llava.generate(**picture, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)

    import zipvl_compile  # only to ask what was kept

    assert "site-packages" in zipvl_compile.__file__, zipvl_compile.__file__
    check("LLaVA", picture["input_ids"].shape[1], zipvl_compile.kept_tokens(out))

    text = tiny_llama.prompt(40)
    compiled = torch.compile(tiny_llama.model(), backend="zipvl", options=OPTIONS)
    with torch.no_grad():
        out = compiled(input_ids=text, use_cache=True)
    check("Llama", text.shape[1], zipvl_compile.kept_tokens(out))


def check(name: str, prompt: int, kept: list[torch.Tensor | None]) -> None:
    counts = [0 if positions is None else int((positions < prompt).sum()) for positions in kept]
    print(f"{name}: kept {counts} of {prompt} tokens")
    assert counts and all(0 < count < prompt for count in counts)


if __name__ == "__main__":
    main()
