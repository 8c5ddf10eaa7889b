"""Keys and values that left a compacted cache: they know that tokens are missing.

Scripts take `layer.keys` and `layer.values` out of a cache, move them, store them, and make another cache of them. Of a
compacted cache these tensors hold the kept tokens only; taken for a whole prompt they give wrong positions and wrong
answers, silently. So they are tensors of their own type that carries what else the layer knew:

    kept = layer.keys                                   KeptTensor [B, Hkv, cached_length, D]
    kept.to("cpu").clone()                              KeptTensor, still knows the positions
    DynamicCache([(k, v), ...], config=config)          a compacted cache again, exactly
    kept[:, :, :10], torch.cat([kept, other])           other tokens: an error as soon as a cache is made of it
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zipvl_compile.dynamo import as_plain_tensors

REBUILT = (
    "{name}: expected keys and values of every token, got those of a compacted KV cache that holds only the important "
    "tokens{what}. Copy or edit the cache as a whole: copy.deepcopy(cache), cache.batch_select_indices(...), "
    "cache.batch_repeat_interleave(...), cache.reorder_cache(...) or cache.crop(...); keep unchanged pairs with "
    "DynamicCache(pairs, config=model.config); run prompts that belong together as one batch; or compile with "
    "options={{'evict': 'keep'}} to keep the full cache."
)


@dataclass(frozen=True)
class Held:
    """What a compacted layer knows of its tokens.

    Attributes:
        positions: int64 `[B, G, P]`, where the kept prompt tokens stood.
        prompt_length: of the prompt (tokens).
        n: logical length (tokens), prompt and later tokens.
        elsewhere: whether the layer holds the other prompt tokens apart from its keys and values.
    """

    positions: torch.Tensor
    prompt_length: int
    n: int
    elsewhere: bool = False


class KeptTensor(torch.Tensor):
    """Keys or values of the kept tokens; `held` is None where it can no longer be told which tokens they are of."""

    held: Held | None = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _JOINING:
            raise RuntimeError(REBUILT.format(name=func.__name__, what=", and cannot be joined with others"))
        with as_plain_tensors():
            result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or isinstance(result, cls):
            return result
        source = next((x for x in (*args, *kwargs.values()) if isinstance(x, cls)), None)
        if source is None or not (result.dim() == source.dim() or func in _VIEWS):
            return result  # a norm, a mean, one number
        held = source.held if func in _SAME_TOKENS and result.shape == source.shape else None
        return mark(result, held)

    # A subclass is stored as its type and its attributes, which `torch.load` knows as safe.
    def __reduce_ex__(self, protocol):
        return (mark, (self.as_subclass(torch.Tensor), self.held))

    def __deepcopy__(self, memo):
        return mark(self.as_subclass(torch.Tensor).clone(), self.held)


_TENSOR = torch.Tensor
_JOINING = {torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack}
_SAME_TOKENS = {
    _TENSOR.to, _TENSOR.cpu, _TENSOR.cuda, _TENSOR.clone, _TENSOR.contiguous, _TENSOR.detach, _TENSOR.float,
    _TENSOR.half, _TENSOR.bfloat16, _TENSOR.double, _TENSOR.type, _TENSOR.pin_memory, torch.clone, torch.detach,
    _TENSOR.data.__get__,  # type: ignore[attr-defined]
}  # fmt: skip
_VIEWS = {
    _TENSOR.__getitem__, _TENSOR.view, _TENSOR.reshape, _TENSOR.flatten, _TENSOR.squeeze, _TENSOR.unsqueeze,
    torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze,
}  # fmt: skip


def mark(tensor: torch.Tensor, held: Held | None) -> KeptTensor:
    """Return keys or values of a compacted cache as such: no copy."""
    kept = tensor.as_subclass(KeptTensor)
    kept.held = held
    return kept


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor without its mark: no copy."""
    return tensor.as_subclass(torch.Tensor)


def held_by(keys: torch.Tensor, values: torch.Tensor) -> Held:
    """Return which tokens a pair of marked keys and values are of.

    Raises:
        ValueError: only one of them is marked, or they are of other tokens than those that left a layer.
    """
    for name, tensor in (("key_states", keys), ("value_states", values)):
        if not isinstance(tensor, KeptTensor):
            raise ValueError(REBUILT.format(name=name, what=" for the other one of the pair"))
        if tensor.held is None:
            raise ValueError(REBUILT.format(name=name, what=", and which of them is no longer known"))
    if keys.held.positions is not values.held.positions or keys.held.n != values.held.n:  # type: ignore[attr-defined]
        same = keys.held.n == values.held.n and torch.equal(keys.held.positions, values.held.positions)  # type: ignore[attr-defined]
        if not same:
            raise ValueError(REBUILT.format(name="value_states", what=", and other ones than the keys"))
    return keys.held  # type: ignore[attr-defined]


torch.serialization.add_safe_globals([mark, KeptTensor, Held])
