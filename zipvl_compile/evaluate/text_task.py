"""Long documents: how well a model continues one, and repeats a passage of it, after a prefill of each variant.

    prompt [N] -> cache;  cache + continuation [128] -> NLL, KL to dense, agreement
                          cache + passage [32 + 96] -> NLL of the last 96, which repeat the prompt after a cue of 32

Both parts are given to the model as they are (teacher forcing), each in one forward over a copy of the cache.
"""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from zipvl_compile.cache.hf_names import as_argument, cache_of
from zipvl_compile.callers import LOGITS_TO_KEEP
from zipvl_compile.evaluate.compiled import Compiled
from zipvl_compile.evaluate.documents import Document
from zipvl_compile.evaluate.flops import CountedFlops
from zipvl_compile.evaluate.measures import Item, agreement, kept_share, kl, nll
from zipvl_compile.evaluate.variants import PICTURE_SCALE, Options
from zipvl_compile.report.stats import stats

CONTINUATION, CUE, REPEATED = 128, 32, 96


class TextTask:
    """One model and its documents; `run` measures one variant.

    Attributes:
        case: what was measured, for the results.
        count: of documents.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, documents: Sequence[Document], split: str, tokens: int, most: int
    ):
        """Tokenize the documents.

        Args:
            name: of the model.
            model, tokenizer: as `load_text_model` returns them.
            documents: to prompt with; those that are too short for the model's tokenizer are left out.
            split: of the documents.
            tokens: of the prompt.
            most: of the documents, from the first.

        Raises:
            ValueError: too few tokens to repeat a passage, or no document that is long enough.
        """
        if tokens < 2 * (CUE + REPEATED):
            raise ValueError(f"--tokens: expected at least {2 * (CUE + REPEATED)}, got {tokens}. Use 1024.")
        self.model, self.tokens, self._compiled = model, tokens, Compiled(model)
        texts = [(one.name, tokenizer(one.text, return_tensors="pt").input_ids.to(model.device)) for one in documents]
        self.prompts = [
            (of, ids[:, : tokens + CONTINUATION]) for of, ids in texts if ids.shape[1] >= tokens + CONTINUATION
        ]
        self.prompts = self.prompts[:most]
        if not self.prompts:
            longest = max((ids.shape[1] for _, ids in texts), default=0)
            raise ValueError(
                f"--tokens: expected at most {longest - CONTINUATION}, since the longest document has {longest} "
                f"tokens, {CONTINUATION} of which are to be continued, got {tokens}. Lower it."
            )
        self.count = len(self.prompts)
        self.case = f"{name}, {self.count} documents ({split}), {tokens} tokens"
        self._dense: list[torch.Tensor] = []

    def takes(self, options: Options) -> bool:
        """Return whether a variant says something about texts."""
        return PICTURE_SCALE not in options

    @torch.no_grad()
    def run(self, options: Options, advance: Callable[[], None] = lambda: None) -> list[Item]:
        """Return what each document gave.

        Args:
            options: of the backend; none are the dense model, which comes first.
            advance: called after each document.
        """
        if not options:
            self._dense = []
        items = []
        with warnings.catch_warnings(), self._compiled.as_variant(options, dynamic=None) as (model, new):  # one length
            warnings.filterwarnings("ignore", "zipvl: a later part of a prompt")  # the continuations are
            if new:
                self._measure(model, *self.prompts[0], 0)
            for index, (name, ids) in enumerate(self.prompts):
                items.append(self._measure(model, name, ids, index))
                advance()
        return items

    def _measure(self, model: Any, name: str, ids: torch.Tensor, index: int) -> Item:
        n = self.tokens
        if len(self._dense) <= index and model is not self.model:
            raise ValueError("variant: expected dense to be measured before others, got another one. Run it first.")
        with CountedFlops() as counted:
            last, cache = _prefill(model, ids[:, :n])
        held = stats(cache)
        kept = kept_share(cache, n)
        start = passage_start(name, n)
        passage = ids[:, start : start + CUE + REPEATED]
        repeated = _continue(model, passage, copy.deepcopy(cache))[CUE - 1 : -1]
        continued = torch.cat([last, _continue(model, ids[:, n:], cache)[:-1]])
        if model is self.model:
            self._dense.append(continued)
        dense = self._dense[index]
        return {
            "item": name,
            "nll": nll(continued, ids[0, n:]),
            "kl": kl(dense, continued),
            "agreement": agreement(dense, continued),
            "rep_nll": nll(repeated, passage[0, CUE:]),
            "kept": kept,
            "kv_bytes": held.bytes_used,
            "kv_bytes_allocated": held.bytes_allocated,
            "prefill_flops": counted.total,
        }


def passage_start(name: str, tokens: int) -> int:
    """Return where the passage to repeat starts: before the newest probe rows, drawn by the document's name."""
    return random.Random(name).randrange(16, tokens - 64 - CUE - REPEATED)


def _prefill(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """Return log-probabilities of the token after the prompt, `[1, vocabulary]`, and the cache of the prompt."""
    one = {LOGITS_TO_KEEP: 1} if LOGITS_TO_KEEP in inspect.signature(model.forward).parameters else {}
    out = model(input_ids=ids, use_cache=True, **one)
    cache = cache_of(out)
    if cache is None:
        raise ValueError(
            f"model: expected one whose forward returns a KV cache, got {type(model).__name__}, which returned none. "
            "Use a causal language model of Hugging Face."
        )
    return out.logits[0, -1:].float().log_softmax(1), cache


def _continue(model: Any, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Return log-probabilities `[m, vocabulary]` of the tokens after each of `ids [1, m]`, which the cache takes in."""
    out = model(input_ids=ids, use_cache=True, **as_argument(cache, model.forward))
    return out.logits[0].float().log_softmax(1)
