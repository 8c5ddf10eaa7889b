"""Whose queries a layer notes, and how many; what no attention reads notes none."""

import pytest
import torch
from support import tiny_llama

from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.passes.note_queries import noted_rows
from zipvl_compile.passes.settings import Settings
from zipvl_compile.pipeline import leaving_out


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize(("every", "probes", "rows"), [(10, (4, 4), 8), (5, (4, 4), 5), (7, (0, 0), 1)])
def test_as_many_rows_as_measure_attention(every, probes, rows):
    assert noted_rows(Settings(reselect_every=every, recent_probes=probes[0], random_probes=probes[1])) == rows


def step(f, cache):
    with torch.no_grad():
        return f(input_ids=tiny_llama.prompt(1, seed=4), **as_argument(cache))


def test_a_layer_has_the_queries_of_its_attention():
    f = tiny_llama.compiled(keep_tokens=30, reselect_every=10, recent_probes=3, random_probes=0)
    seen = []
    f.model.layers[1].self_attn.q_proj.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    with torch.no_grad():
        cache = cache_of(f(input_ids=tiny_llama.prompt(80), use_cache=True))
    queries = cache.layers[1].queries
    assert queries.shape == (1, 4, 3, 16) and not queries.any()
    for _ in range(2):
        step(f, cache)
    # A rotation leaves the length of a query as it is.
    noted = cache.layers[1].queries.norm(dim=-1)[0]
    made = torch.stack([one.reshape(4, 16).norm(dim=-1) for one in seen[-2:]], 1)
    torch.testing.assert_close(noted[:, :2], made)
    assert not noted[:, 2].any()


def test_without_the_pass_nothing_is_dropped():
    """Keys, which the layer traced, are no queries."""
    f = tiny_llama.compiled(keep_tokens=30, reselect_every=2)
    with leaving_out("note_queries"):
        with torch.no_grad():
            cache = cache_of(f(input_ids=tiny_llama.prompt(80), use_cache=True))
        for _ in range(3):
            step(f, cache)
    assert [layer.cached_length for layer in cache.layers] == [33, 33]
