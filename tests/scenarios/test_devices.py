"""Where weights are: device maps, offloading, FSDP2 and accelerate, each compared with the model on one device."""

from __future__ import annotations

import tempfile
import warnings

import accelerate
import pytest
import torch
from accelerate.big_modeling import attach_align_device_hook_on_blocks
from accelerate.utils import TorchDynamoPlugin
from support import tiny_llama, tiny_llava
from support.quiet import nothing_compiled_or_said  # noqa: F401
from torch import distributed
from transformers import LlavaForConditionalGeneration

import zipvl_compile
from zipvl_compile.report import compile_report
from zipvl_compile.report.compile_report import collect

OPTIONS = {"min_tokens": 0, "inner": "eager"}
HALF = {"keep_ratio": 0.5}
PROMPT = {"input_ids": tiny_llama.prompt(60)}
SPLIT = "only the KV cache is compacted. Hooks of accelerate"
PAPER = HALF | {"policy": "paper"}  # gives rows of zeros


def generated(f, x=PROMPT):
    return f.generate(**x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)


def compiled(f, **options):
    f.compile(backend="zipvl", options=OPTIONS | options)
    return f


def kept(out):
    return [positions.tolist() for positions in zipvl_compile.kept_tokens(out)]


def assert_same(out, expected):
    assert torch.equal(out.sequences, expected.sequences) and kept(out) == kept(expected)
    assert all(len(positions[0][0]) < out.sequences.shape[1] * 0.7 for positions in kept(out))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llava.model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_a_device_map_of_one_device_changes_nothing(saved, device_map):
    x, usual = tiny_llava.inputs(text=20), tiny_llava.model()
    f = LlavaForConditionalGeneration.from_pretrained(saved, device_map=device_map).eval()
    f.generation_config = usual.generation_config
    assert torch.equal(generated(compiled(f, tau=1.0), x).sequences, generated(usual, x).sequences)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="zipvl")
        assert_same(generated(compiled(f, **HALF), x), generated(compiled(tiny_llava.model(), **HALF), x))


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def several_devices():
    """Return a model with the hooks that a device map over several devices puts on every module."""
    f = tiny_llama.model()
    where = {"": "cpu"} | dict.fromkeys(PARTS, "cpu")
    attach_align_device_hook_on_blocks(f, execution_device=where, offload=dict.fromkeys(PARTS, False))
    return f


def part_on_disk():
    where = dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"}
    return accelerate.dispatch_model(tiny_llama.model(), where, main_device="cpu", offload_dir=tempfile.mkdtemp())


HOOKED = {
    "several devices": several_devices,
    "disk": part_on_disk,
    "cpu": lambda: accelerate.cpu_offload(tiny_llama.model(), execution_device="cpu"),
}


@pytest.mark.parametrize("how", HOOKED)
def test_hooks_change_nothing_by_the_default_rule(how):
    """They end a graph at every module, so that nobody knows what reads the rows of an attention."""
    assert torch.equal(generated(compiled(HOOKED[how](), tau=1.0)).sequences, generated(tiny_llama.model()).sequences)
    torch._dynamo.reset()
    expected = generated(compiled(tiny_llama.model(), **HALF))
    torch._dynamo.reset()
    with warnings.catch_warnings(), collect() as reports:
        warnings.filterwarnings("error", message=f"zipvl: .*{SPLIT}")
        assert_same(generated(compiled(HOOKED[how](), **HALF)), expected)
    assert any("every token attends to its window" in str(one) for report in reports for one in report.pruned)


@pytest.mark.parametrize("how", HOOKED)
def test_hooks_leave_the_prompt_dense_by_a_rule_of_zeros(how):
    expected = generated(compiled(tiny_llama.model(), prefill="dense", **PAPER))
    torch._dynamo.reset()
    compile_report._warned.clear()
    with pytest.warns(UserWarning, match=SPLIT) as warned:
        assert_same(generated(compiled(HOOKED[how](), **PAPER)), expected)
    assert len([one for one in warned if SPLIT in str(one.message)]) == 1


def test_a_device_map_that_offloads_by_itself(saved, tmp_path):
    """Where memory is said to be too small, `device_map="auto"` fills it, and puts the rest on the disk."""
    x, usual = tiny_llava.inputs(text=20), tiny_llava.model()
    f = LlavaForConditionalGeneration.from_pretrained(
        saved, device_map="auto", max_memory={"cpu": 300_000}, offload_folder=tmp_path
    ).eval()
    assert "disk" in f.hf_device_map.values()
    f.generation_config = usual.generation_config
    expected = generated(compiled(usual, **HALF), x)
    torch._dynamo.reset()
    assert_same(generated(compiled(f, **HALF), x), expected)


def test_explain_says_what_hooks_cost():
    notes = zipvl_compile.explain(several_devices(), options=OPTIONS | PAPER, **PROMPT).notes
    assert len([note for note in notes if SPLIT in note]) == 1
    assert not any(SPLIT in note for note in zipvl_compile.explain(tiny_llama.model(), options=OPTIONS, **PROMPT).notes)


@pytest.fixture
def mesh(tmp_path):
    distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def sharded(mesh, layers):
    from torch.distributed.fsdp import fully_shard

    f = tiny_llama.model()
    for part in [*f.model.layers, f] if layers else [f]:
        fully_shard(part, mesh=mesh)
    return f


@pytest.mark.parametrize("layers", [True, False], ids=["layer by layer", "whole"])
@pytest.mark.parametrize("rule", [{}, {"policy": "paper"}, {"policy": "skip_layers", "dense_layers": 0}], ids=str)
def test_fsdp2_keeps_what_one_process_keeps(mesh, layers, rule):
    """Layer by layer, every layer is a graph of its own, in which its attention is rewritten all the same."""
    expected = generated(compiled(tiny_llama.model(), **HALF, **rule))
    torch._dynamo.reset()
    with collect() as reports:
        assert_same(generated(compiled(sharded(mesh, layers), **HALF, **rule)), expected)
    assert max(len(report.sites) for report in reports) == (1 if layers else 2)
    assert all(site.rewritten for report in reports for site in report.sites)


def test_fsdp2_with_every_token_kept(mesh):
    f = compiled(sharded(mesh, layers=True), tau=1.0)
    assert torch.equal(generated(f).sequences, generated(tiny_llama.model()).sequences)


@pytest.fixture
def accelerator():
    """Return what makes an Accelerator: its state is that of the process."""
    yield lambda **how: accelerate.Accelerator(cpu=True, **how)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("named", ["plugin", "backend", "environment"])
def test_accelerate_takes_the_backends_that_it_lists_only(accelerator, monkeypatch, named):
    """The remedy is in the README: compile, then `prepare`."""
    if named == "environment":
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "zipvl")
    with pytest.raises(ValueError, match="'ZIPVL' is not a valid DynamoBackend"):
        if named == "plugin":
            TorchDynamoPlugin(backend="zipvl")
        accelerator(**({"dynamo_backend": "zipvl"} if named == "backend" else {}))


@pytest.mark.parametrize("backend", ["no", "eager"])
@pytest.mark.parametrize("regional", [False, True])
def test_a_model_that_was_compiled_stays_so_whatever_backend_accelerate_has(accelerator, backend, regional):
    expected = generated(compiled(tiny_llama.model(), **HALF))
    torch._dynamo.reset()
    f = tiny_llama.model()
    zipvl_compile.compile(f, **OPTIONS, **HALF)
    plugin = TorchDynamoPlugin(backend=backend, use_regional_compilation=regional)
    prepared = accelerator(dynamo_plugin=plugin).prepare(f)
    assert_same(generated(prepared), expected)
    out = prepared(**PROMPT, use_cache=True, logits_to_keep=1)
    assert all(len(positions[0][0]) == 30 for positions in kept(out))
