"""`record`: compile with the passes, run once; the float64 model of the paper."""

import pytest
import torch
from support import graph_modules as small_modules
from support import paper as model_of_the_paper
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.recording import SELECTION, Recorder

from zipvl_compile.kernels.probe_rows import probe_rows
from zipvl_compile.passes.settings import Settings


@pytest.fixture(scope="session")
def paper():
    """Return the float64 model of the paper, which shares no code with the operators."""
    return model_of_the_paper


@pytest.fixture(scope="session")
def modules():
    """Return the small modules whose graphs are rewritten."""
    return small_modules


@pytest.fixture
def record():
    """Return `record(module, *inputs, ...)`: compile, run once, return the output and the recorder."""
    torch._dynamo.reset()

    def compile_and_run(
        module, *inputs, dynamic=None, inner=None, passes=True, prune=False, rows=None, read=False, **changed
    ):
        recorder = Recorder(Settings(**SELECTION | changed) if passes else None, inner, prune, rows, read)
        recorder.compiled = torch.compile(module, backend=recorder, dynamic=dynamic)
        return recorder.compiled(*inputs), recorder

    yield compile_and_run
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def by_the_paper(paper):
    """Return `by_the_paper(q, k, v, ...)`: output and kept positions in float64, for the selection of `record`."""

    def compute(q, k, v, *, mask=None, is_causal=True, scale=None, softcap=None, **changed):
        chosen = Settings(**SELECTION | changed)
        rows = probe_rows(q.shape[2], chosen.recent_probes, chosen.random_probes, chosen.seed)
        look = {"mask": mask, "is_causal": is_causal, "scale": scale, "softcap": softcap}
        scores, visible = paper.scores(q, k, rows, groups=1 if chosen.groups == "layer" else k.shape[1], **look)
        hold = chosen.unselected == "hold"
        kept = paper.selection(
            scores, visible, tau=chosen.tau, keep_ratio=chosen.keep_ratio, keep_tokens=chosen.keep_tokens,
            floor=chosen.floor, keep_recent=chosen.keep_recent, keep_first=max(chosen.keep_first, int(hold)),
        )  # fmt: skip
        queries = {"zero": "selected"}.get(chosen.unselected, chosen.unselected)
        local = {"window": chosen.window, "sinks": chosen.sinks, "kept_window": chosen.kept_window}
        local["first"] = (visible > 0).argmax(1)
        return paper.attention(q, k, v, kept, queries=queries, **look, **local), kept

    return compute
