"""The terms of the loss that have attention rest: what they are of, and that watching changes nothing."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from zipvl_compile.demo.tiny_lvlm.build import build_model
from zipvl_compile.demo.tiny_lvlm.resting import ROWS, watching

PREFIX, LENGTH = 40, 52


def forward(model, embeds):
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    return model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state


def test_watching_changes_no_output_and_leaves_the_model_as_it_was():
    model = build_model(0).eval()
    embeds = torch.randn(1, LENGTH, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    usual = model.model.language_model.config._attn_implementation
    with torch.no_grad():
        expected = forward(model, embeds)
        with watching(model, np.random.default_rng(0), PREFIX, LENGTH) as watched:
            found = forward(model, embeds)
        again = forward(model, embeds)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, expected) and model.model.language_model.config._attn_implementation == usual
    for term in (watched.picture, watched.question, watched.spread):
        assert len(term) == model.config.text_config.num_hidden_layers
    assert (watched.rows[:ROWS] < PREFIX).all() and (watched.rows[:ROWS] > 0).all()
    assert (watched.rows[ROWS:] >= PREFIX).all() and (watched.rows[ROWS:] < LENGTH).all()


def test_the_terms_of_even_attention_are_logs_of_how_much_is_seen():
    model = build_model(0).eval()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.zero_()
        with watching(model, np.random.default_rng(0), PREFIX, LENGTH) as watched:
            forward(model, torch.randn(1, LENGTH, model.config.text_config.hidden_size))
    picture, questions = ([math.log(row + 1) for row in rows.tolist()] for rows in watched.rows.split(ROWS))
    first, second = sum(picture) / ROWS, sum(questions) / ROWS
    for found, expected in ((watched.picture, first), (watched.question, second), (watched.spread, second)):
        torch.testing.assert_close(torch.stack(found), torch.full((len(found),), expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        watched.loss(0.5, 0.25, 0.125).item(), 0.5 * first + 0.375 * second, rtol=1e-4, atol=1e-4
    )
    said = {"picture": first, "question": second, "spread": second}
    assert str(watched) == ", ".join(f"{name} {' '.join([f'{value:.2f}'] * 4)}" for name, value in said.items())


def test_a_mask_of_numbers_is_added_to_the_scores():
    model = build_model(0).eval()
    bias = torch.zeros(LENGTH).index_fill(0, torch.tensor([5]), 3.0)
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1) + bias
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.zero_()
        with watching(model, np.random.default_rng(0), PREFIX, LENGTH) as watched:
            model.model.language_model(
                inputs_embeds=torch.randn(1, LENGTH, model.config.text_config.hidden_size),
                attention_mask=mask[None, None],
                use_cache=False,
            )
    expected = [math.log(sum(bias[: row + 1].exp().tolist())) for row in watched.rows[:ROWS].tolist()]
    torch.testing.assert_close(torch.stack(watched.picture), torch.full((4,), sum(expected) / ROWS))


def test_the_loss_has_attention_rest():
    model = build_model(0).train()
    embeds = torch.randn(1, LENGTH, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.model.language_model.parameters(), lr=2e-3)
    first = last = 0.0
    for step in range(12):
        with watching(model, np.random.default_rng(0), PREFIX, LENGTH) as watched:
            forward(model, embeds)
        loss = watched.loss(1.0, 0.1, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
    assert last < 0.5 * first
