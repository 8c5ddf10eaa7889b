"""A user's code, for `mypy --strict` and pyright where the wheel is installed: every public name, with its types."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from typing_extensions import assert_type

import zipvl_compile


def use(model: PreTrainedModel, ids: torch.Tensor) -> None:
    paths = zipvl_compile.compile(model, path="", attention="sdpa", tau=0.9)
    assert_type(paths, list[str])
    compiled = torch.compile(model, backend="zipvl", options={"min_tokens": 0})
    out = compiled(input_ids=ids)
    assert_type(zipvl_compile.kept_tokens(out), list[torch.Tensor | None])
    with zipvl_compile.settings(tau=0.8, floor=0.3):
        compiled(input_ids=ids)
    with zipvl_compile.requests() as done:
        compiled(input_ids=ids)
    assert_type(done, list[zipvl_compile.RequestStats])
    report = zipvl_compile.explain(model, options={"tau": 0.9}, input_ids=ids)
    print(report, report.prompt_length, zipvl_compile.stats(out).layers, zipvl_compile.recent_reports())
    zipvl_compile.grow(zipvl_compile.fork(out.cache), 16)
    assert_type(zipvl_compile.__version__, str)
