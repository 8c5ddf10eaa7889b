"""Every token attends to kept tokens, its window and the sinks; a layer keeps a quarter at least."""

import torch
from support import paper
from support.policies import N, attention_outputs, model, run
from support.quiet import one_thread_without_gradients  # noqa: F401
from support.tiny_llama import prompt

from zipvl_compile.policies.union import POLICY


def first_attention(kept, window):
    """Return what the attention of the first layer adds to each token, from its weights: `[n, hidden]`."""
    llama = model().model
    block = llama.layers[0]
    with torch.no_grad():
        x = llama.embed_tokens(prompt(N))
        cos, sin = llama.rotary_emb(x, torch.arange(N)[None])
        x = block.input_layernorm(x)
        q, k, v = (
            project(x).unflatten(2, (-1, block.self_attn.head_dim)).transpose(1, 2)
            for project in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        )
        q, k = (t * cos[:, None] + torch.cat((-t[..., 8:], t[..., :8]), -1) * sin[:, None] for t in (q, k))
        out = paper.attention(q, k, v, kept[None, None], queries="all", kept_window=True, window=window)
        return block.self_attn.o_proj(torch.from_numpy(out).float().transpose(1, 2).flatten(2))[0]


def test_every_row_sees_kept_tokens_and_its_window():
    for window in (5, 64):
        out, kept = attention_outputs("union", tau=0.6, window=window)
        assert 25 <= len(kept) < N
        torch.testing.assert_close(out, first_attention(kept, window), atol=1e-5, rtol=1e-4)
    dense, _ = attention_outputs("union", tau=1.0)
    near, _ = attention_outputs("union", tau=0.6, window=N)
    torch.testing.assert_close(near, dense, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out, dense, atol=1e-4)


def test_no_layer_starves():
    _, kept = run("union", tau=1e-6)
    assert [positions.shape[2] for positions in kept] == [25] * 4
    assert (POLICY.floor, POLICY.unselected, POLICY.kept_window) == (0.25, "all", True)
