"""What stands behind the private names of PyTorch."""

from __future__ import annotations

import torch

from zipvl_compile.passes.graph.private import without_repeated_fakes


def test_fake_results_are_computed_anew_inside_and_kept_again_after():
    seen = []

    def backend(gm, inputs):
        mode = torch._guards.detect_fake_mode()
        with without_repeated_fakes():
            seen.append(mode.cache_enabled)
        seen.append(mode.cache_enabled)
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert seen == [False, True]


def test_nothing_is_being_traced():
    with without_repeated_fakes():
        pass
