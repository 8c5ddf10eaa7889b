"""What a policy keeps in a small Llama, and what it should keep by its own description."""

from __future__ import annotations

import torch
from support import paper, tiny_llama

import zipvl_compile
from zipvl_compile.kernels.probe_rows import probe_rows
from zipvl_compile.pipeline import leaving_out

N, LAYERS = 100, 4


def model():
    return tiny_llama.model(num_hidden_layers=LAYERS)


def run(policy: str, n: int = N, batch: int = 1, **options):
    """Return the output of a prefill, with all hidden states, and the kept positions `[B, 1, P]` of each layer."""
    torch._dynamo.reset()
    compiled = tiny_llama.compiled({"num_hidden_layers": LAYERS}, policy=policy, **options)
    with torch.no_grad(), leaving_out("read_demands"):
        out = compiled(tiny_llama.prompt(n, batch), use_cache=True, output_hidden_states=True)
    return out, zipvl_compile.kept_tokens(out)


def dense(n: int = N):
    """Return the output of the eager model, with all hidden states."""
    with torch.no_grad():
        return model()(tiny_llama.prompt(n), use_cache=True, output_hidden_states=True)


def attention_of(layer: int, hidden: torch.Tensor, rows: torch.Tensor):
    """Return accumulated `[1, 1, n]` and visible `[1, n]` of the rows; `hidden [1, n, hidden]` comes into the layer."""
    llama = model().model
    block, n = llama.layers[layer], hidden.shape[1]
    with torch.no_grad():
        x = block.input_layernorm(hidden)
        cos, sin = llama.rotary_emb(hidden, torch.arange(n)[None])
        q, k = (
            project(x).unflatten(2, (-1, block.self_attn.head_dim)).transpose(1, 2)
            for project in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        q, k = (t * cos[:, None] + torch.cat((-t[..., 8:], t[..., :8]), -1) * sin[:, None] for t in (q, k))
    return paper.scores(q, k, rows)


def paper_rows(n: int = N):
    return probe_rows(n, 64, 64, 0)


class _Nothing(torch.nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def attention_outputs(policy: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the attention of the first layer adds to each token `[n, hidden]`, and the tokens it keeps `[P]`."""
    torch._dynamo.reset()
    compiled = tiny_llama.compiled({"num_hidden_layers": LAYERS}, policy=policy, **options)
    compiled.model.layers[0].mlp = _Nothing()
    with torch.no_grad(), leaving_out("read_demands"):
        out = compiled(tiny_llama.prompt(N), use_cache=True, output_hidden_states=True)
    before, after = out.hidden_states[:2]
    return (after - before)[0], zipvl_compile.kept_tokens(out)[0][0, 0]
