"""A whole compiled LLaVA in float64 against an independent Llama with the paper's attention, layer by layer.

Path one: Dynamo, the passes, the operators. Path two: `reference/paper.py`, written from the formulas in NumPy, in a
Llama layer spelled out below. They share the weights of the model and the draw of the probe rows. All hidden states are
compared as the paper computes them, so the pass is left out that has every query attend where they are read.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import paper
from support.tiny_llava import compiled, inputs, model

from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.kernels.probe_rows import probe_rows
from zipvl_compile.pipeline import leaving_out

TIGHT = {"atol": 1e-9, "rtol": 1e-9}


def rotate(x, cos, sin):
    """Apply rotary embedding to `x [B, H, n, D]`, pair (d, d + D/2) by pair; `cos`, `sin` are `[n, D/2]`."""
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class PaperLlama:
    """A Llama whose prefill selects tokens as the paper says, and whose decode sees only those."""

    def __init__(self, llama, **rule):
        self.llama, self.rule, self.cache = llama, rule, []
        config = llama.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads

    # Hugging Face computes norms and angles in float32 whatever the dtype, so those are the model's own modules.
    @staticmethod
    def norm(module, x):
        return module(torch.from_numpy(x)).detach().numpy()

    def angles(self, length):
        at = torch.arange(self.offset, self.offset + length)[None]
        half = self.llama.layers[0].self_attn.head_dim // 2
        return [t[0, :, :half].numpy() for t in self.llama.rotary_emb(torch.zeros(1, dtype=torch.float64), at)]

    @staticmethod
    def linear(module, x):
        return x @ paper.array(module.weight).T

    def split(self, x, heads):
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    def run(self, x, mask, attend):
        hidden = [x]
        angles = self.angles(x.shape[1])
        for i, layer in enumerate(self.llama.layers):
            attention, mlp = layer.self_attn, layer.mlp
            y = self.norm(layer.input_layernorm, x)
            q = rotate(self.split(self.linear(attention.q_proj, y), self.heads), *angles)
            k = rotate(self.split(self.linear(attention.k_proj, y), self.kv_heads), *angles)
            v = self.split(self.linear(attention.v_proj, y), self.kv_heads)
            out = attend(i, *(torch.from_numpy(t) for t in (q, k, v)), mask)
            x = x + self.linear(attention.o_proj, out.transpose(0, 2, 1, 3).reshape(x.shape))
            y = self.norm(layer.post_attention_layernorm, x)
            gate = self.linear(mlp.gate_proj, y)
            x = x + self.linear(mlp.down_proj, gate / (1 + np.exp(-gate)) * self.linear(mlp.up_proj, y))
            hidden.append(x)
        hidden[-1] = self.norm(self.llama.norm, x)
        return hidden

    def prefill(self, x, mask):
        self.offset, self.prompt_length = 0, x.shape[1]
        even = self.rule.pop("even", False)
        look = {"queries": self.rule.pop("queries", "selected"), "kept_window": self.rule.pop("kept_window", False)}

        def attend(i, q, k, v, mask):
            rows = probe_rows(q.shape[2], 64, 64, 0)
            kept = paper.selection(*paper.scores(q, k, rows, mask=mask, even=even), **self.rule)
            self.cache.append([k, v, kept])
            return paper.attention(q, k, v, kept, mask=mask, **look)

        return self.run(x, mask, attend)

    def decode(self, x, mask):
        self.offset = self.cache[0][0].shape[2]

        def attend(i, q, k, v, mask):
            entry = self.cache[i]
            entry[:2] = torch.cat([entry[0], k], 2), torch.cat([entry[1], v], 2)
            return paper.decode(q, *entry[:2], entry[2], self.prompt_length, mask=mask)

        return self.run(x, mask, attend)


def four_dim(mask, n):
    """Return the padding mask `[B, n]` as bool `[B, 1, 1, n]`, or None where nothing is padded."""
    return None if mask.all() else mask.bool()[:, None, None, :n]


CASES = {
    "tau_0.9": ({"tau": 0.9}, {}, {}),
    "tau_0.6": ({"tau": 0.6}, {}, {}),
    "ratio_0.3_recent_4": ({"keep_ratio": 0.3, "keep_recent": 4}, {}, {}),
    "all_queries": ({"tau": 0.7, "unselected": "all"}, {"queries": "all"}, {}),
    "union": (
        {"policy": "union", "tau": 0.7},
        {"queries": "all", "kept_window": True, "floor": 0.25, "even": True},
        {"text": 95},
    ),
    "long_prompt_with_random_probes": ({"tau": 0.7}, {}, {"text": 95}),
    "batch_left_padding": ({"tau": 0.8}, {}, {"batch": 2, "pad": 7}),
    "batch_right_padding": ({"tau": 0.8}, {}, {"batch": 2, "pad": 7, "side": "right"}),
}


@pytest.fixture(autouse=True)
def the_papers_rule():
    with leaving_out("read_demands"):
        yield


@pytest.mark.parametrize("case", CASES)
def test_positions_attention_cache_and_decode_equal_the_papers(case):
    options, extra, shape = CASES[case]
    x = inputs(**{"text": 20} | shape)
    x["pixel_values"] = x["pixel_values"].double()
    f, plain = compiled(**{"policy": "paper"} | options).double(), model().double()
    n, seen = x["input_ids"].shape[1], x["attention_mask"]
    with torch.no_grad():
        embeds = plain(**x, output_hidden_states=True).hidden_states[0]
        out = f(**x, use_cache=True, output_hidden_states=True)

    rule = {k: v for k, v in options.items() if k not in ("unselected", "policy")} | extra
    reference = PaperLlama(plain.model.language_model, **rule)
    rows = four_dim(seen, n)
    mask = None if rows is None else rows.expand(-1, -1, n, -1)
    expected = reference.prefill(paper.array(embeds), mask)

    for layer, (k, v, kept) in zip(cache_of(out).layers, reference.cache, strict=True):
        assert layer.positions.shape[2] < n
        assert np.array_equal(layer.positions.numpy(), kept)
        index = torch.from_numpy(kept)[..., None].expand(-1, k.shape[1], -1, k.shape[3])
        torch.testing.assert_close(layer.keys, k.gather(2, index), **TIGHT)
        torch.testing.assert_close(layer.values, v.gather(2, index), **TIGHT)
    for ours, theirs in zip(out.hidden_states, expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), **TIGHT)

    for token in (9, 10, 11):  # decode on the compacted cache
        ids = torch.full((x["input_ids"].shape[0], 1), token)
        seen = torch.cat([seen, torch.ones_like(ids)], 1)
        with torch.no_grad():
            out = f(input_ids=ids, attention_mask=seen, **as_argument(cache_of(out)), output_hidden_states=True)
            embeds = plain.get_input_embeddings()(ids)
        expected = reference.decode(paper.array(embeds), four_dim(seen, seen.shape[1]))
        for ours, theirs in zip(out.hidden_states, expected, strict=True):
            torch.testing.assert_close(ours, torch.from_numpy(theirs), **TIGHT)
