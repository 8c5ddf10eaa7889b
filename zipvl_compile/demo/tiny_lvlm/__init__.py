"""Two small LLaVAs that answer questions about handwritten digits, trained on CPU cores, shipped here.

Folders for ``AutoProcessor.from_pretrained`` and ``AutoModelForImageTextToText.from_pretrained``: ``CHECKPOINT``, whose
pictures are 256 image tokens, for measures of quality; ``LARGE_CHECKPOINT``, with 9,216 of them, for the demo.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
LARGE_CHECKPOINT = Path(__file__).parent / "checkpoint_large"
