"""Whether the layers of a compacted cache hold equally many tokens, as every whole forward leaves them.

A forward that is interrupted between its layers leaves some of them a step further than others. Masks and position ids
come from the first layer alone, so the next forward would answer wrongly without a word.
"""

from __future__ import annotations

from typing import Any

from zipvl_compile.passes.graph.reading import example
from zipvl_compile.passes.match.cache_layers import views_above
from zipvl_compile.passes.match.sites import Sites


def uneven_layers(sites: Sites) -> list[tuple[str, int]]:
    """Return two attentions of a decode graph whose layers hold one prompt and unlike numbers of tokens, if there are.

    Where lengths are symbols the comparison becomes a guard: with other lengths the graph is compiled, and looked at,
    again.

    Returns:
        Each with its logical length (tokens); empty if all agree.
    """
    first: list[tuple[str, Any, Any]] = []
    for site in sites.decode:
        view = views_above(site.attention)[0]
        prompt, n = example(view.prompt_length), example(view.n)
        name, _, expected = next((one for one in first if one[1] == prompt), (site.name, prompt, n))
        if n != expected:
            return [(name, int(expected)), (site.name, int(n))]
        first.append((site.name, prompt, n))
    return []
