"""What stands around an attention among kept tokens is read back from the graph."""

from support.hidden_states import RATIO, Stack, hidden_states

from zipvl_compile.passes.prefill.around import Around
from zipvl_compile.passes.prune_projections import refusal


def test_what_surrounds_an_attention_is_read_from_the_graph(record):
    _, recorder = record(Stack(), hidden_states(), **RATIO)
    sites = recorder.sites[0].prefill
    around = [Around(site.node) for site in sites]
    assert all(one.whole and not one.all_attend for one in around)
    assert not any(refusal(site, one) for site, one in zip(sites, around, strict=True))
    assert all(one.scores.q is one.query and one.selection.keep_ratio == RATIO["keep_ratio"] for one in around)
