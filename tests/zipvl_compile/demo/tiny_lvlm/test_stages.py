"""The stages of training: one step each."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the handwritten digits come from scikit-learn")

from zipvl_compile.demo.tiny_lvlm.batches import IGNORED, pack_questions, packed_mask, pixel_values
from zipvl_compile.demo.tiny_lvlm.build import build_model, word_ids
from zipvl_compile.demo.tiny_lvlm.canvas import CELL, LARGE, SMALL
from zipvl_compile.demo.tiny_lvlm.questions import EOS, KINDS
from zipvl_compile.demo.tiny_lvlm.recipe import LARGE_RECIPE, Recipe
from zipvl_compile.demo.tiny_lvlm.scenes import draw_scene
from zipvl_compile.demo.tiny_lvlm.stages import STAGES, answer_logits, patch_features


def test_packed_questions_do_not_see_each_other():
    """The loss of a packed row is that of its questions asked one by one."""
    rng = np.random.default_rng(2)
    model = build_model(0).eval()
    scenes = [draw_scene(rng)]
    packed = pack_questions(rng, scenes, 5, dict.fromkeys(KINDS, 1.0))
    everything, ids_of = torch.arange(SMALL.tokens)[None], word_ids(SMALL)
    with torch.no_grad():
        together = answer_logits(model, patch_features(model, pixel_values(scenes), everything), everything, packed)
        apart = []
        for number in range(5):
            mine = packed.group[0] == number
            prefix = [ids_of["<bos>"], *[ids_of["<image>"]] * SMALL.tokens]
            ids = torch.tensor([prefix + packed.ids[0, mine].tolist()])
            logits = model(input_ids=ids, pixel_values=pixel_values(scenes)).logits[0, len(prefix) :]
            apart.append(logits[packed.labels[0, mine] != IGNORED])
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=1e-4)
    assert (packed.labels == ids_of[EOS]).sum() == 5
    mask = packed_mask(packed.group, 3)[0, 0]
    assert mask[3:, :3].all() and not mask.triu(1).any()


FEW = {
    "align_steps": 3, "align_batch": 1, "compact_steps": 1, "compact_batch": 1, "full_steps": 1, "full_batch": 1,
    "polish_steps": 1, "polish_batch": 1, "questions_per_image": 2,
}  # fmt: skip
SHORT = {
    "small": Recipe(**FEW),
    "large": replace(LARGE_RECIPE, **FEW, full_patches=(64, 128), polish_patches=(64, 128), polish_whole=0.0),
}


def changed(model, before):
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


def test_a_vision_tower_that_sees_all_it_is_asked_for_gives_what_it_gives():
    rng, model = np.random.default_rng(2), build_model(0, LARGE).eval()
    pixels, everything = pixel_values([draw_scene(rng, canvas=LARGE)]), torch.arange(LARGE.tokens)[None]
    patches = pixels.unfold(2, CELL, CELL).unfold(3, CELL, CELL).flatten(2, 3).transpose(1, 2)
    few = everything[:, ::64]
    with torch.no_grad():
        whole, same = (patch_features(model, given, everything) for given in (pixels, patches))
        torch.testing.assert_close(whole, same, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(patch_features(model, pixels, few), whole[:, ::64])
        assert not torch.allclose(patch_features(model, patches[:, ::64], few), whole[:, ::64], atol=1e-3)


@pytest.mark.parametrize("canvas", SHORT)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_trains_its_part_of_the_model_and_reports_at_its_end(name, canvas):
    recipe = SHORT[canvas]
    model = build_model(0, recipe.canvas).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    lines = list(STAGES[name](model, recipe))
    assert len(lines) == getattr(recipe, f"{name}_steps") and lines[-1].startswith("loss ")
    assert recipe.report_split.replace("_", " ") in lines[-1]
    parts = {
        "language" if "language_model" in name or "lm_head" in name else "vision" for name in changed(model, before)
    }
    assert parts == {"align": {"vision"}, "compact": {"language"}}.get(name, {"vision", "language"})
