"""The error for a cache that an interrupted forward left uneven; `uneven_layers` finds it."""

from __future__ import annotations

import pytest

from zipvl_compile.cache import uneven
from zipvl_compile.passes.match.sites import Sites


def test_layers_that_agree_pass_and_others_are_named_with_the_remedy(monkeypatch):
    uneven.check_layers_agree(Sites())
    monkeypatch.setattr(uneven, "uneven_layers", lambda sites: [("layers.0", 74), ("layers.1", 73)])
    with pytest.raises(uneven.UnevenCacheError, match=r"74 in layers.0 and 73 in layers.1.*interrupted.*layer\.crop"):
        uneven.check_layers_agree(Sites())
    assert issubclass(uneven.UnevenCacheError, ValueError)
