"""Masks that need no matrix, in every way that models write them."""

import torch
from transformers import masking_utils

N = 9
PADDING = torch.ones(2, N, dtype=torch.long)
PADDING[0, :3] = 0
SPANS = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, -1]] * 2)
LOWEST = torch.finfo(torch.float32).min


def rows(x):
    return torch.arange(x.shape[1])


def hugging_face(function, additive=False, vmap=False):
    """Make the mask as transformers' models do."""

    def make(padding, x):
        make_one = masking_utils.eager_mask if additive else masking_utils.sdpa_mask
        return make_one(
            batch_size=2, q_length=x.shape[1], kv_length=x.shape[1], mask_function=function,
            attention_mask=padding.bool(), allow_is_causal_skip=False, use_vmap=vmap,
        )  # fmt: skip

    return make


def triangle(x, diagonal=0):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(diagonal)


CAUSAL, BOTH = ("causal",), ("causal", "padding")
CASES = {
    "transformers": (hugging_face(masking_utils.causal_mask_function), BOTH),
    "transformers-additive": (hugging_face(masking_utils.causal_mask_function, additive=True), BOTH),
    "transformers-vmap": (hugging_face(masking_utils.causal_mask_function, vmap=True), BOTH),
    "transformers-vmap-additive": (hugging_face(masking_utils.causal_mask_function, True, True), BOTH),
    "both-ways": (hugging_face(masking_utils.bidirectional_mask_function), ("padding",)),
    "triu-of-full": (lambda p, x: torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None], CAUSAL),
    "triu-function": (lambda p, x: torch.triu(torch.full((x.shape[1],) * 2, LOWEST), diagonal=1), CAUSAL),
    "two-terms": (
        lambda p, x: torch.full((x.shape[1],) * 2, LOWEST).triu(1) + (1 - p[:, None, None].bool().float()) * LOWEST,
        BOTH,
    ),
    "tril-and": (lambda p, x: triangle(x)[None, None] & p[:, None, None, :].bool(), BOTH),
    "logical-and": (lambda p, x: torch.logical_and(triangle(x), p.bool().unsqueeze(1).unsqueeze(1)), BOTH),
    "not-greater": (lambda p, x: ~(rows(x)[None, :] > rows(x)[:, None]), CAUSAL),
    "difference": (lambda p, x: rows(x)[:, None] - rows(x)[None] >= 0, CAUSAL),
    "strictly-less": (lambda p, x: rows(x)[None] < rows(x)[:, None] + 1, CAUSAL),
    "where": (lambda p, x: torch.where(triangle(x), 0.0, LOWEST)[None, None].expand(2, 1, -1, -1), CAUSAL),
    "masked-fill": (lambda p, x: torch.zeros(x.shape[1], x.shape[1]).masked_fill(~triangle(x), -10000.0), CAUSAL),
    "positive-padding": (lambda p, x: triangle(x) & (p[:, None, None] > 0), BOTH),
    "everything": (lambda p, x: torch.ones(2, 1, x.shape[1], x.shape[1], dtype=torch.bool), ()),
    "where-of-tensors": (lambda p, x: torch.where(triangle(x), torch.tensor(0.0), torch.tensor(LOWEST)), CAUSAL),
    "nothing-added": (lambda p, x: torch.zeros(1, 1, x.shape[1], x.shape[1]), ()),
}
