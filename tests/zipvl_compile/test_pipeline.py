"""The pipeline as a whole: options reach the passes, rows fit together, faults and dumps leave the model as it is."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.graph_modules import Wrapped

from zipvl_compile import pipeline
from zipvl_compile.callers import newest_rows_read
from zipvl_compile.options import ZipVLOptions
from zipvl_compile.passes.settings import Settings
from zipvl_compile.pipeline import PIPELINE, Row, rewrite, settings_of, without
from zipvl_compile.report.costs import DENSE_FROM


def traced(function, *inputs):
    """Return the graph module that Dynamo hands to a backend."""
    found = []
    torch._dynamo.reset()
    torch.compile(function, backend=lambda gm, _: found.append(gm) or gm.forward, fullgraph=True)(*inputs)
    return found[0]


def prefill(modules):
    def function(q, k, v):
        return modules.attend(q, k, v, is_causal=True), *modules.cache(k, v)

    return function


@pytest.fixture
def modules():
    from support import graph_modules

    return graph_modules


def test_every_option_of_the_method_reaches_the_passes():
    chosen = {
        "recent_probes": 3, "random_probes": 4, "draw": "strided", "seed": 5, "score": "value", "pooling": 3,
        "tau": 0.5, "floor": 0.2, "keep_recent": 6, "keep_first": 2, "unselected": "all", "window": 8, "sinks": 1,
        "kept_window": True, "prefill": "dense", "dense_layers": 1, "score_every": 2, "groups": "layer",
        "skip": "layer", "skip_in": (1, 2), "evict": "keep", "min_tokens": 7, "kernel": "torch",
        "reselect_tokens": 256, "reselect_every": 50, "evict_bits": 8,
    }  # fmt: skip
    settings = settings_of(ZipVLOptions(**chosen))
    assert {name: getattr(settings, name) for name in chosen} == chosen
    assert settings_of(ZipVLOptions(keep_ratio=0.25)).keep_ratio == 0.25
    assert settings_of(ZipVLOptions(keep_tokens=9)).keep_tokens == 9
    assert settings.newest_rows_read is newest_rows_read, "the callers of a graph are asked"
    names = {field.name for field in dataclasses.fields(Settings)}
    names -= {"newest_rows_read", "decoder_layers", "per_request", "dense_from"}
    assert names == {*chosen, "keep_ratio", "keep_tokens"}, "a new setting belongs into this test"
    assert names <= {field.name for field in dataclasses.fields(ZipVLOptions)}, "one name from the option to the pass"


def test_defaults_are_the_papers():
    settings, plain = settings_of(ZipVLOptions()), Settings()
    assert callable(settings.min_tokens) and settings.dense_from == DENSE_FROM, "the cost model decides"
    assert settings_of(ZipVLOptions(min_tokens=0)).dense_from == plain.dense_from == 1.0
    given = dataclasses.replace(
        settings,
        min_tokens=0,
        dense_from=1.0,
        newest_rows_read=plain.newest_rows_read,
        decoder_layers=plain.decoder_layers,
        per_request=plain.per_request,
    )
    assert given == plain
    assert (plain.tau, plain.recent_probes, plain.random_probes, plain.unselected) == (0.975, 64, 64, "zero")


def test_every_row_gets_what_it_needs():
    given = {"sites"}
    for row in PIPELINE:
        assert given.issuperset(row.needs), f"{row.name} needs {set(row.needs) - given} of an earlier row"
        given.add(row.gives)
    assert len({row.name for row in PIPELINE}) == len({row.gives for row in PIPELINE}) == len(PIPELINE)


def test_without_leaves_passes_out_and_knows_their_names():
    assert [row.name for row in without("fuse_gathers")] == [r.name for r in PIPELINE if r.name != "fuse_gathers"]
    with pytest.raises(ValueError, match=r"names: expected passes of the pipeline, got \['fuse'\]"):
        without("fuse")


def test_passes_are_left_out_inside_the_block_only():
    whole = pipeline.PIPELINE
    with pytest.raises(KeyError), pipeline.leaving_out("fuse_gathers", "choose_kernels"):
        assert tuple(row for row in whole if row.name not in ("fuse_gathers", "choose_kernels")) == pipeline.PIPELINE
        assert list(rewrite(traced(F.relu, torch.randn(3)).graph, Settings()).seconds)[-1] == "keep_every_token"
        raise KeyError
    assert pipeline.PIPELINE is whole


def test_every_pass_is_timed(modules):
    gm = traced(prefill(modules), *modules.qkv())
    done = rewrite(gm.graph, Settings())
    assert list(done.seconds) == ["match", *(row.name for row in PIPELINE)]
    assert all(seconds > 0 for seconds in done.seconds.values())


def fail_after_changing(graph, sites, settings):
    """Take away what the attention gives, then fail."""
    site = sites.prefill[0]
    with graph.inserting_before(site.node):
        site.node.replace_all_uses_with(graph.call_function(torch.neg, (site.attention.query,)))
    graph.erase_node(site.node)
    site.rewritten = True
    raise RuntimeError("a fault of ours")


def leave_a_broken_graph(graph, sites, settings):
    sites.prefill[0].node.args = (graph.output_node().prev, *sites.prefill[0].node.args[1:])


@pytest.mark.parametrize("place", range(len(PIPELINE) + 1))
@pytest.mark.parametrize("broken", [fail_after_changing, leave_a_broken_graph], ids=lambda f: f.__name__)
def test_a_pass_that_fails_is_undone_and_the_others_go_on(modules, monkeypatch, broken, place):
    """At every place of the pipeline: the rest of it makes of the graph what it would have made without the fault."""
    inputs = modules.qkv(n=20)
    expected = rewrite(traced(prefill(modules), *inputs).graph, Settings(keep_ratio=0.5))
    row = Row("broken", broken, (), "nothing")
    gm = traced(prefill(modules), *inputs)
    sites_then = place == 0 or broken is leave_a_broken_graph
    with pytest.warns(UserWarning, match="the pass broken failed and was left out"):
        done = rewrite(gm.graph, Settings(keep_ratio=0.5), (*PIPELINE[:place], row, *PIPELINE[place:]))
    assert list(done.faults) == ["broken"] and (sites_then or "a fault of ours" in done.faults["broken"])
    assert [str(n.target) for n in done.graph.nodes] == [str(n.target) for n in expected.graph.nodes]
    assert done.sites.outcomes == expected.sites.outcomes and done.sites.pruned == expected.sites.pruned
    gm.graph, other = done.graph, traced(prefill(modules), *inputs)
    other.graph = expected.graph
    for got, wanted in zip(gm(*inputs), other(*inputs), strict=True):
        assert torch.equal(got, wanted)


def test_matching_that_fails_leaves_the_graph_alone(modules, monkeypatch):
    gm = traced(prefill(modules), *modules.qkv())
    before = [(node.op, str(node.target)) for node in gm.graph.nodes]
    monkeypatch.setattr(pipeline, "match", lambda graph: 1 / 0)
    with pytest.warns(UserWarning, match="match failed"):
        done = rewrite(gm.graph, Settings(), ())
    assert "ZeroDivisionError" in done.faults["match"]
    assert [(node.op, str(node.target)) for node in done.graph.nodes] == before


def test_dumps_are_readable_python_before_and_after_each_pass(modules, monkeypatch, tmp_path):
    monkeypatch.setenv("ZIPVL_DUMP", str(tmp_path / "dumps"))
    gm = traced(prefill(modules), *modules.qkv())
    rewrite(gm.graph, Settings(), [row for row in PIPELINE if row.name in ("sparsify_prefill", "read_compact_cache")])
    (folder,) = (tmp_path / "dumps").iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "00_sparsify_prefill_before.py", "01_sparsify_prefill_after.py",
        "02_read_compact_cache_before.py", "03_read_compact_cache_after.py",
    ]  # fmt: skip
    before, after = ((folder / name).read_text() for name in names[:2])
    for text in (before, after):
        compile(text, "dump", "exec")
    assert "select_tokens" not in before
    call = "_nn.scaled_dot_product_attention("
    assert call in before and "zipvl.select_tokens.default(" in after and call not in after


def test_nothing_is_dumped_unless_asked(modules, monkeypatch, tmp_path):
    monkeypatch.delenv("ZIPVL_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    rewrite(traced(Wrapped(lambda x: F.relu(x)), torch.randn(3)).graph, Settings())
    assert not list(tmp_path.iterdir())
