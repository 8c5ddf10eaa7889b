"""What each rank of `scenarios/test_ranks.py` runs: a model spread over ranks, and the same in one process.

Ranks share heads (tensor parallelism); or the weights of layers (FSDP2) or nothing (DDP), with a prompt for each.

torchrun --nproc-per-node N rank_worker.py FOLDER        reads FOLDER/cases.json, writes FOLDER/rank-R.json
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS.parent))
sys.path.remove(str(TESTS / "support"))
for name in ("support", "families"):
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(TESTS / name)]
    sys.modules[name] = module_from_spec(spec)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from support import tiny_llama, tiny_models, tiny_moe  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from zipvl_compile.cache.hf_names import cache_of  # noqa: E402
from zipvl_compile.report.compile_report import collect  # noqa: E402

PATIENCE = timedelta(seconds=60)  # a rank that waits longer fails, and with it the test


class Sums(TorchDispatchMode):
    """Note how many rows each sum over ranks carries."""

    def __init__(self):
        super().__init__()
        self.rows = []

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "all_reduce" in str(func) and args[0].dim() == 3 and args[0].shape[2] == 64:  # hidden states
            self.rows.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


def model(family: str):
    if family in tiny_moe.KINDS:
        return tiny_moe.model(family)
    return tiny_llama.model(num_key_value_heads=4) if family == "llama" else tiny_models.model(family)


def inputs(family: str, **prompt) -> dict[str, torch.Tensor]:
    words = family in ("llama", *tiny_moe.KINDS)
    return {"input_ids": tiny_llama.prompt(**prompt)} if words else tiny_models.inputs(family, **prompt)


def loaded(folder: Path, case: dict, spread: bool):
    """Return the model of a case, with the same weights each time."""
    built = model(case["family"])
    path = folder / case["family"]
    if not spread:
        built.save_pretrained(path)
    heads = spread and case["how"] == "heads"
    found = type(built).from_pretrained(path, **({"tp_plan": "auto"} if heads else {})).eval()
    found.generation_config = built.generation_config
    if spread and case["how"] == "fsdp2":
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in found.get_decoder().layers:  # not all: generate runs the vision tower outside of `forward`
            fully_shard(layer, mesh=mesh)
    return found


def answers(folder: Path, case: dict, spread: bool):
    """Return the tokens, first logits and kept positions of each prompt of a case, its sites, and rows of sums."""
    torch._dynamo.reset()
    f, found, rank = loaded(folder, case, spread), [], dist.get_rank()
    f.compile(backend="zipvl", options={"inner": "eager", "min_tokens": 0, **case["options"]})
    with collect() as reports:
        for prompt in case["prompts"] if not spread or case["how"] == "heads" else [case["prompts"][rank]]:
            x = inputs(case["family"], **prompt)
            if spread and rank == 1:
                time.sleep(case["late"])
            out = f.generate(**x, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
            logits, cache = out.logits[0], cache_of(out)
            if spread and case["how"] == "ddp":
                with torch.no_grad():
                    prefill = DistributedDataParallel(f)(**x, use_cache=True, logits_to_keep=1)
                logits, cache = prefill.logits[:, -1], cache_of(prefill)
            kept = [layer.positions for layer in cache.layers]
            found.append((out.sequences, logits, kept, x["input_ids"].shape[1]))
    with Sums() as sums, torch.no_grad():
        if spread and case["rows"]:
            f(**x, use_cache=True, logits_to_keep=1)
    sites = [site for report in reports for site in report.sites if site.kind == "prefill"]
    return found, sites, sums.rows


def compared(folder: Path, name: str, case: dict) -> dict:
    """Return how a model on several ranks differs from one in one process, which the first rank asks."""
    path = folder / f"{name}.pt"
    if dist.get_rank() == 0:
        torch.save(answers(folder, case, spread=False)[0], path)
    dist.barrier()
    one = torch.load(path)
    one = one if case["how"] == "heads" else [one[dist.get_rank()]]
    two, sites, rows = answers(folder, case, spread=True)
    pairs = list(zip(one, two, strict=True))
    kept = [pair for (_, _, a, _), (_, _, b, _) in pairs for pair in zip(a, b, strict=True)]
    return {
        "tokens": all(torch.equal(a[0], b[0]) for a, b in pairs),
        "logits": max((a[1] - b[1]).abs().max().item() for a, b in pairs),
        "positions": all(torch.equal(a, b) for a, b in kept),
        "kept": [b.shape[2] for _, b in kept],
        "reasons": sorted({str(site.reason) for site in sites if site.reason is not None}),
        "rewritten": sum(site.rewritten for site in sites),
        "rows": rows,
        "prompt": two[-1][3],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=PATIENCE)
    cases = json.loads((folder / "cases.json").read_text())
    found = {name: compared(folder, name, case) for name, case in cases.items()}
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
