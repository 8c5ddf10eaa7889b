"""The documents: two splits that share nothing and stay as they are."""

import pytest

from zipvl_compile.evaluate import documents as module
from zipvl_compile.evaluate.documents import SOURCES, SPLITS, documents

ABOUT_1152_TOKENS = 4600  # characters


def test_splits_are_disjoint_and_hold_enough_long_documents():
    found = {split: documents(split) for split in SPLITS}
    names = {split: {one.name for one in ones} for split, ones in found.items()}
    texts = [one.text for ones in found.values() for one in ones]
    assert not names["report"] & names["choose"] and len(set(texts)) == len(texts) == len(set(SOURCES))
    long = {split: sum(len(one.text) > ABOUT_1152_TOKENS for one in ones) for split, ones in found.items()}
    assert long["report"] >= 12 and long["choose"] >= 12, long


def test_splits_are_stable(monkeypatch):
    assert [one.name for one in documents("report")] == list(SOURCES[::2])
    assert SOURCES[:4] == ("topic types", "topic execmodel", "doc numpy.nditer", "doc numpy.fft")
    # Neither what is not installed nor what is added moves another one.
    missing = ("doc no_such_package", "file no_such_package/x.rst", "topic no such topic")
    monkeypatch.setattr(module, "SOURCES", (SOURCES[0], SOURCES[1], *missing, *SOURCES[5:7], "topic with"))
    assert [one.name for one in documents("report")] == [SOURCES[0], SOURCES[6]]
    assert [one.name for one in documents("choose")] == [SOURCES[1], SOURCES[5], "topic with"]


def test_a_split_of_another_name():
    with pytest.raises(ValueError, match="--split: expected report or choose, got 'test'"):
        documents("test")
