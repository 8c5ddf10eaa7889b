"""A small LLaVA that answers questions about handwritten digits, trained on one CPU core, shipped here.

``CHECKPOINT`` is a folder for ``AutoProcessor.from_pretrained`` and
``AutoModelForImageTextToText.from_pretrained``.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
