"""Tasks and models on disk, and lmms-eval's own evaluation of them; `make test-lmms` installs lmms-eval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def offline():
    """Nothing is asked of the hub; what lmms-eval reads must be in the folders below."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The small bundled model."""
    from support.lmms_task import write_model

    return write_model(tmp_path_factory.mktemp("bundled") / "model")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory, model):
    """The folder of its tasks."""
    from support.lmms_task import write_tasks

    return write_tasks(tmp_path_factory.mktemp("tasks"), model, questions=18, choices=4)


@pytest.fixture(scope="session")
def evaluate(tasks) -> Callable[..., dict[str, Any]]:
    """Return what `lmms-eval` returns for a model of its and one task; the same call is evaluated once."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    known: dict[tuple, dict[str, Any]] = {}

    def run(name: str, args: str, task: str, *, simple: bool = False, batch_size: int = 1) -> dict[str, Any]:
        key = (name, args, task, simple, batch_size)
        if key not in known:
            manager = TaskManager(include_path=str(tasks), include_defaults=False, model_name=name)
            known[key] = simple_evaluate(
                model=name, model_args=args, tasks=[task], task_manager=manager, batch_size=batch_size, device="cpu",
                force_simple=simple, bootstrap_iters=0, log_samples=True,
            )  # fmt: skip
        return known[key]

    return run
