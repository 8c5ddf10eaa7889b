"""The recipes: one for each canvas; that of the large one reports nothing on held-out digits."""

from zipvl_compile.demo.tiny_lvlm.canvas import CANVASES
from zipvl_compile.demo.tiny_lvlm.questions import KINDS
from zipvl_compile.demo.tiny_lvlm.recipe import LARGE_RECIPE, RECIPES


def test_a_recipe_for_every_canvas():
    assert RECIPES.keys() == CANVASES.keys()
    for name, recipe in RECIPES.items():
        assert recipe.canvas == CANVASES[name]
        assert set(recipe.question_weights) == set(recipe.polish_weights) == set(KINDS)
        for first, last in (recipe.compact_patches, recipe.full_patches, recipe.polish_patches):
            assert 0 < first < last <= recipe.canvas.tokens
    assert LARGE_RECIPE.report_split == "train" and LARGE_RECIPE.polish_weighs
