"""A processor that lmms-eval's LLaVA can weigh answers with.

Its `loglikelihood` processes prompt and answer with the pictures, and the prompt alone without, to see where the answer
begins. Processors of transformers 5 refuse a text that has more image tokens than there are pictures; those before
returned one token for a picture, so that the answer began hundreds of tokens too early.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import ProcessorMixin

ATTRIBUTE = "_image_processor"


class SamePictures:
    """A processor that adds the pictures of the last call to a call without any."""

    def __init__(self, processor: Any) -> None:
        """Stand in the place of a processor, and be it otherwise."""
        self._processor, self._pictures = processor, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *args: Any, images: Any = None, **kwargs: Any) -> Any:
        self._pictures = self._pictures if images is None else images
        return self._processor(*args, images=self._pictures, **kwargs)


@contextlib.contextmanager
def same_pictures(lm: Any) -> Iterator[None]:
    """Have a model of lmms-eval process prompts alone with their pictures, inside the `with` block."""
    processor = getattr(lm, ATTRIBUTE, None)
    if not isinstance(processor, ProcessorMixin):
        yield
        return
    setattr(lm, ATTRIBUTE, SamePictures(processor))
    try:
        yield
    finally:
        setattr(lm, ATTRIBUTE, processor)
