"""The stages of training: one step each."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from zipvl_compile.demo.tiny_lvlm.batches import IGNORED, pack_questions, packed_mask, pixel_values
from zipvl_compile.demo.tiny_lvlm.build import WORD_ID, build_model
from zipvl_compile.demo.tiny_lvlm.questions import EOS, KINDS
from zipvl_compile.demo.tiny_lvlm.scenes import IMAGE_TOKENS, draw_scene
from zipvl_compile.demo.tiny_lvlm.stages import STAGES, Recipe, _set_rate, answer_logits, patch_features


def test_packed_questions_do_not_see_each_other():
    """The loss of a packed row is that of its questions asked one by one."""
    rng = np.random.default_rng(2)
    model = build_model(0).eval()
    scenes = [draw_scene(rng)]
    packed = pack_questions(rng, scenes, 5, dict.fromkeys(KINDS, 1.0))
    everything = torch.arange(IMAGE_TOKENS)[None]
    with torch.no_grad():
        together = answer_logits(model, patch_features(model, pixel_values(scenes)), everything, packed)
        apart = []
        for number in range(5):
            mine = packed.group[0] == number
            prefix = [WORD_ID["<bos>"], *[WORD_ID["<image>"]] * IMAGE_TOKENS]
            ids = torch.tensor([prefix + packed.ids[0, mine].tolist()])
            logits = model(input_ids=ids, pixel_values=pixel_values(scenes)).logits[0, len(prefix) :]
            apart.append(logits[packed.labels[0, mine] != IGNORED])
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=1e-4)
    assert (packed.labels == WORD_ID[EOS]).sum() == 5
    mask = packed_mask(packed.group, 3)[0, 0]
    assert mask[3:, :3].all() and not mask.triu(1).any()


SHORT = Recipe(
    align_steps=3, align_batch=1, compact_steps=1, compact_batch=1, full_steps=1, full_batch=1, polish_steps=1,
    questions_per_image=2,
)  # fmt: skip


def changed(model, before):
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_trains_its_part_of_the_model_and_reports_at_its_end(name):
    model = build_model(0).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    lines = list(STAGES[name](model, SHORT))
    assert len(lines) == getattr(SHORT, f"{name}_steps") and lines[-1].startswith("loss ") and "held out" in lines[-1]
    parts = {
        "language" if "language_model" in name or "lm_head" in name else "vision" for name in changed(model, before)
    }
    assert parts == {"align": {"vision"}, "compact": {"language"}}.get(name, {"vision", "language"})


def test_the_rate_warms_up_and_falls_to_a_fiftieth():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    rates = []
    for step in range(1000):
        _set_rate(optimizer, step, 1000, warmup=100)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] < 0.01 and max(rates) == max(rates[80:120]) <= 0.5
    assert rates[-1] == pytest.approx(0.01, rel=1e-3)
