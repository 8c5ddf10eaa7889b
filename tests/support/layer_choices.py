"""What four layers cost and save alone."""

from zipvl_compile.evaluate.layer_choices import Choice

# KL, FLOPs saved and tokens saved, of attention alone and of the whole layer
ALONE = {
    0: ((0.5, 0.01, 0.1), (0.9, 0.05, 0.1)),
    1: ((0.01, 0.01, 0.1), (0.02, 0.08, 0.1)),
    2: ((0.1, 0.01, 0.1), (0.5, 0.05, 0.1)),
    3: ((0.02, 0.01, 0.1), (0.04, 0.05, 0.1)),
}


def choices():
    return [Choice(n, skip, *ALONE[n][i]) for i, skip in enumerate(("attention", "layer")) for n in ALONE]
