"""PyTorch's caches on disk hold what other versions of the operators were compiled to: they are told apart."""

import shutil

import torch

from zipvl_compile import caches_apart as module


def test_the_tag_is_set_for_the_time_of_a_compile():
    before = torch.compiler.config.cache_key_tag
    with module.caches_apart():
        assert torch.compiler.config.cache_key_tag == f"{before} zipvl {module.digest_of_operators()}"
    assert torch.compiler.config.cache_key_tag == before


def test_another_operator_is_another_digest(monkeypatch, tmp_path):
    digest = module.digest_of_operators.__wrapped__
    here = digest()
    package = tmp_path / "package"
    shutil.copytree(module.Path(module.__file__).parent / "kernels", package / "kernels")
    monkeypatch.setattr(module, "__file__", str(package / "caches_apart.py"))
    assert digest() == here
    with (package / "kernels" / "gather_tokens.py").open("a") as file:
        file.write("# changed\n")
    assert digest() != here
