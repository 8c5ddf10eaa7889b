"""Models spread over ranks: every rank keeps the tokens that one process keeps."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parents[1] / "support" / "rank_worker.py"
SHORT, LONG = {"text": 12}, {"text": 40, "seed": 1}
PADDED = {"batch": 2, "text": 24, "pad": 9}
HALF, PAPER = {"keep_ratio": 0.5}, {"policy": "paper", "tau": 0.8}


def case(family, options, *prompts, rows=False, how="heads", late=0):
    """Return what each rank runs: its own prompt unless ranks share "heads". Rank 1 comes `late` to each (seconds)."""
    return {"family": family, "options": options, "prompts": prompts, "rows": rows, "how": how, "late": late}


CASES = {
    "every token": case("llava", {"tau": 1.0}, SHORT),
    "union": case("llava", HALF, SHORT),
    "paper": case("llava", PAPER, SHORT, PADDED),
    "skipped layers": case("llava", HALF | {"policy": "skip_layers", "dense_layers": 0}, LONG, rows=True),
    "qwen2_5_vl": case("qwen2_5_vl", PAPER, PADDED),
    "internvl": case("internvl", HALF | {"policy": "paper"}, SHORT, rows=True),
    "experts": case("mixtral", HALF | {"policy": "skip_layers", "dense_layers": 0}, {"n": 80}, rows=True),
    "experts beside a shared one": case("llama4", HALF | {"policy": "paper"}, {"n": 80, "batch": 2}),
    "layers shared": case("llava", HALF, SHORT, LONG, how="fsdp2", late=3),
    "samples of their own": case("llava", HALF | {"policy": "paper"}, LONG, SHORT, how="ddp"),
}
FOUR = {"four ranks": case("llama", HALF | {"policy": "paper"}, {"n": 80, "batch": 2}, late=3)}
LAUNCHES = {2: CASES, 4: FOUR}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return a function that runs the cases of so many ranks, once, and returns what each rank found of each case."""

    @functools.cache
    def launched(ranks):
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "cases.json").write_text(json.dumps(LAUNCHES[ranks]))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return folder, subprocess.run([*command, WORKER, folder], capture_output=True, text=True, timeout=600)

    def of_each(ranks):
        folder, done = launched(ranks)
        assert done.returncode == 0, done.stderr[-6000:]
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]

    return of_each


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build of PyTorch without ranks")


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, cases in LAUNCHES.items() for name in cases])
def test_ranks_keep_what_one_process_keeps(found, ranks, name):
    """Also where one of them comes late to every prompt: nothing that is decided depends on time."""
    for rank in found(ranks):
        assert rank[name]["reasons"] == [] and rank[name]["rewritten"]
        assert rank[name]["positions"] and rank[name]["tokens"]
        assert rank[name]["logits"] < 1e-4
        assert any(kept < rank[name]["prompt"] for kept in rank[name]["kept"]) == (name != "every token")


def test_sums_over_ranks_carry_the_rows_that_are_needed(found):
    """The embedding's; of a layer the output projection's and the MLP's; of the last layer both have the newest row."""
    half, skipped = found(2)[0]["internvl"], found(2)[0]["skipped layers"]
    assert half["rows"] == [half["prompt"], half["kept"][-1], half["prompt"], 1, 1]
    experts = found(2)[0]["experts"]  # whose own sums have no axis for samples, and are not counted
    assert experts["rows"] == [experts["prompt"], experts["kept"][-1], 1]
    assert skipped["rows"] == [skipped["prompt"], *[skipped["kept"][-1]] * 2, 1, 1]
