"""The checkpoint that is shipped, loaded once a file."""

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from zipvl_compile.demo.tiny_lvlm import CHECKPOINT


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
