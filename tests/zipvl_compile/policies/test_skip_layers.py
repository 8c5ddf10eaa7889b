"""Tokens that a layer does not keep pass it: a small Llama written out, and FLOPs that go with the kept tokens."""

import pytest
import torch
from support import tiny_llama
from support.policies import LAYERS, N, model, run
from support.quiet import one_thread_without_gradients  # noqa: F401

from zipvl_compile.options import OptionError, ZipVLOptions
from zipvl_compile.policies.skip_layers import POLICY
from zipvl_compile.report.compile_report import recent_reports


def test_the_first_layers_keep_every_token_and_what_is_not_kept_passes_the_others():
    out, kept = run("skip_layers", keep_ratio=0.3, dense_layers=2)
    assert [positions.shape[2] for positions in kept] == [N, N, 30, 30]
    hidden = out.hidden_states  # the last of them after the final norm
    others = torch.ones(N, dtype=torch.bool)
    others[kept[2][0, 0]] = False
    assert torch.equal(hidden[3][0, others], hidden[2][0, others])
    assert not torch.isclose(hidden[3][0, ~others], hidden[2][0, ~others]).all(-1).any()
    assert (POLICY.skip, POLICY.unselected, POLICY.dense_layers) == ("layer", "zero", 0.25)


def test_a_fraction_of_the_layers_keeps_every_token():
    for fraction, dense in ((0.25, 1), (0.5, 2), (0.51, 3)):
        _, kept = run("skip_layers", keep_ratio=0.3, dense_layers=fraction)
        assert [positions.shape[2] for positions in kept] == [N] * dense + [30] * (LAYERS - dense)


@pytest.mark.parametrize("batch", [1, 2])
def test_every_token_kept_is_the_model_itself(batch):
    out, _ = run("skip_layers", batch=batch, tau=1.0, dense_layers=0)
    with torch.no_grad():
        expected = model()(tiny_llama.prompt(N, batch))
    torch.testing.assert_close(out.logits, expected.logits)


def test_the_report_says_that_tokens_pass_the_layer():
    run("skip_layers", keep_ratio=0.3, dense_layers=1)
    report = recent_reports()[-1]
    assert [one.skipped for one in report.pruned] == [""] * (LAYERS - 1)
    assert str(report).count("pruned: q, v, output, layer") == LAYERS - 1


@pytest.mark.parametrize("beside", [{"unselected": "all"}, {"policy": "union"}, {"prefill": "dense"}, {}])
def test_what_cannot_stand_beside_it_is_an_error(beside):
    with pytest.raises(OptionError, match="skip='layer'"):
        ZipVLOptions.parse({"skip": "layer"} | beside)
    assert ZipVLOptions.parse({"policy": "paper", "skip": "layer"}).skip == "layer"
