"""Keys and values that left a compacted cache: rebuilt exactly, or an error; never taken for a whole prompt."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from zipvl_compile.cache.compact_layer import CompactLayer
from zipvl_compile.cache.kept_tensor import KeptTensor, mark, plain

PROMPT, KEPT, LATER = 10, 4, 2


def compacted(batch: int = 1, positions: list[int] | None = None) -> CompactLayer:
    """Return a layer that kept 4 of 10 prompt tokens and has 2 later ones, with 3 spare rows."""
    layer = CompactLayer()
    generator = torch.Generator().manual_seed(batch)
    layer.key_buffer = torch.randn(batch, 2, KEPT + LATER + 3, 5, generator=generator)
    layer.value_buffer = torch.randn(batch, 2, KEPT + LATER + 3, 3, generator=generator)
    layer.positions = torch.tensor([[positions or [0, 3, 7, 9]]]).repeat(batch, 1, 1)
    layer.prompt_length, layer.cumulative_length = PROMPT, PROMPT + LATER
    layer.is_initialized, layer.device, layer.dtype = True, torch.device("cpu"), torch.float32
    return layer


def assert_same(a: CompactLayer, b: CompactLayer) -> None:
    assert (a.get_seq_length(), a.prompt_length, a.cached_length) == (
        b.get_seq_length(),
        b.prompt_length,
        b.cached_length,
    )
    for x, y in ((a.keys, b.keys), (a.values, b.values), (a.cached_positions, b.cached_positions)):
        assert torch.equal(plain(x), plain(y))


SAME_TOKENS = {
    "as they are": lambda x: x,
    "clone": lambda x: x.clone(),
    "torch.clone": torch.clone,
    "to dtype": lambda x: x.to(torch.float64).to(torch.float32),
    "to device": lambda x: x.to("cpu", non_blocking=True),
    "double and float": lambda x: x.double().float(),
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.contiguous(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


def stored_and_loaded(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)  # weights only


SAME_TOKENS["torch.save"] = stored_and_loaded


@pytest.mark.parametrize("how", SAME_TOKENS)
def test_a_layer_is_rebuilt_from_its_pair(how):
    layer, new = compacted(), CompactLayer()
    new.update(*map(SAME_TOKENS[how], (layer.keys, layer.values)))
    assert_same(new, layer)


OTHER_TOKENS = {
    "fewer": lambda x: x[:, :, :3],
    "one sample": lambda x: x[:1],
    "another order": lambda x: x.flip(2),
    "reshaped": lambda x: x.flatten(0, 1).view(x.shape),
    "selected": lambda x: x.index_select(2, torch.tensor([0, 1])),
    "repeated": lambda x: x.repeat(2, 1, 1, 1),
    "scaled": lambda x: x * 2,
    "padded": lambda x: torch.nn.functional.pad(x, (0, 0, 1, 0)),
}


@pytest.mark.parametrize("how", OTHER_TOKENS)
@pytest.mark.parametrize("kind", [CompactLayer, DynamicLayer])
def test_other_tensors_made_of_a_pair_fill_no_layer(kind, how):
    layer, new = compacted(2), kind()
    pair = [OTHER_TOKENS[how](x) for x in (layer.keys, layer.values)]
    with pytest.raises((ValueError, RuntimeError), match="expected keys and values of every token"):
        new.update(*pair)
    assert new.get_seq_length() == 0


def test_a_layer_of_transformers_takes_no_pair_of_a_compacted_one():
    layer = compacted()
    with pytest.raises(RuntimeError, match=r"cat: expected keys and values of every token"):
        DynamicCache([(layer.keys, layer.values)])


def test_half_a_pair_is_refused():
    layer = compacted()
    for pair in ((plain(layer.keys), layer.values), (layer.keys, plain(layer.values))):
        with pytest.raises(ValueError, match="for the other one of the pair"):
            CompactLayer().update(*pair)


def test_keys_and_values_of_two_layers_are_no_pair():
    with pytest.raises(ValueError, match="other ones than the keys"):
        CompactLayer().update(compacted().keys, compacted(positions=[0, 1, 2, 9]).values)


def test_two_compacted_layers_are_not_joined_into_a_batch():
    with pytest.raises(RuntimeError, match=r"cat: .* cannot be joined .* run prompts .* as one batch"):
        torch.cat([compacted().keys, compacted().keys])


@pytest.mark.parametrize("cropped", [0, 1])
def test_a_rebuilt_layer_and_its_source_grow_apart(cropped):
    layer, new = compacted(), CompactLayer()
    before = layer.keys.clone()
    new.update(layer.keys, layer.values)
    new.crop(-cropped)
    new.update(torch.full((1, 2, 1, 5), 2.0), torch.full((1, 2, 1, 3), 2.0))
    assert torch.equal(plain(layer.keys), plain(before)) and (new.keys[0, 0, -1] == 2).all()
    layer.update(torch.ones(1, 2, 1, 5), torch.ones(1, 2, 1, 3))
    assert (layer.keys[0, 0, -1] == 1).all() and (new.keys[0, 0, -1] == 2).all()
    assert layer.get_seq_length() == new.get_seq_length() + cropped == PROMPT + LATER + 1


def test_what_is_computed_from_keys_is_an_ordinary_tensor():
    keys = compacted().keys
    assert type(keys.norm()) is torch.Tensor and type(keys.mean((2, 3))) is torch.Tensor
    assert isinstance(keys, KeptTensor) and keys.numpy().shape == (1, 2, 6, 5)
    assert torch.cat([keys.mean(2), keys.mean(2)]).shape == (2, 2, 5)


def test_assigned_pairs_of_the_layer_itself_leave_it_as_it_was():
    layer, other = compacted(), compacted()
    layer.keys, layer.values = layer.keys.double(), layer.values.double()
    assert layer.get_seq_length() == PROMPT + LATER and layer.keys.dtype == torch.float64
    layer.keys, layer.values = layer.keys.float(), layer.values.float()
    assert_same(layer, other)
    layer.update(torch.ones(1, 2, 1, 5), torch.ones(1, 2, 1, 3))
    assert layer.get_seq_length() == PROMPT + LATER + 1 and (layer.values[..., -1, :] == 1).all()


@pytest.mark.parametrize("how", OTHER_TOKENS)
@pytest.mark.parametrize("name", ["keys", "values"])
def test_other_tensors_are_not_assigned_and_the_layer_is_unchanged(name, how):
    layer, other = compacted(2), compacted(2)
    with pytest.raises(ValueError, match=rf"{name}: expected keys and values of every token.*4 of 10"):
        setattr(layer, name, OTHER_TOKENS[how](getattr(layer, name)))
    with pytest.raises(ValueError, match=rf"{name}: expected"):
        setattr(layer, name, plain(getattr(layer, name)).clone())
    assert_same(layer, other)


def test_an_older_snapshot_of_the_same_prompt_is_not_assigned():
    layer = compacted()
    snapshot = layer.keys
    layer.update(torch.ones(1, 2, 1, 5), torch.ones(1, 2, 1, 3))
    with pytest.raises(ValueError, match="keys: expected"):
        layer.keys = snapshot


def test_rows_that_were_handed_out_are_not_written_over_after_a_crop():
    layer = compacted()
    keys = layer.keys
    before = keys.clone()
    layer.crop(-2)
    layer.update(torch.ones(1, 2, 1, 5), torch.ones(1, 2, 1, 3))
    assert torch.equal(plain(keys), plain(before)) and (layer.keys[..., -1, :] == 1).all()


def test_copied_containers_grow_apart():
    layer = compacted()
    one, two = copy.copy(layer), copy.copy(layer)
    for turn in range(3):
        for value, each in enumerate((layer, one, two)):
            rows = torch.full((1, 2, 1, 5), 10.0 * value + turn)
            each.update(rows, rows[..., :3])
    for value, each in enumerate((layer, one, two)):
        assert each.keys[0, 0, -3:, 0].tolist() == [10.0 * value + turn for turn in range(3)]


def test_a_layer_that_dropped_nothing_is_edited_as_any_other():
    layer = compacted()
    layer.positions = torch.arange(PROMPT)[None, None]
    layer.key_buffer = torch.randn(1, 2, PROMPT + LATER + 3, 5)
    layer.value_buffer = torch.randn(1, 2, PROMPT + LATER + 3, 3)
    keys, values = layer.keys, layer.values
    assert type(keys) is torch.Tensor and keys.shape[2] == PROMPT + LATER
    layer.keys, layer.values = keys[:, :, :6], values[:, :, :6]
    assert layer.get_seq_length() == 6 and layer.positions is None
    assert torch.equal(layer.keys, keys[:, :, :6]) and torch.equal(layer.values, values[:, :, :6])


def test_a_mark_is_not_lost_by_views_of_any_rank():
    keys = compacted().keys
    assert isinstance(keys.flatten(0, 1), KeptTensor) and isinstance(keys[0], KeptTensor)
    assert mark(plain(keys), None).held is None
