"""What lmms-eval's model does for each document: which it asks for, every `generate`, every other call of the model."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from zipvl_compile.cache.hf_names import cache_of
from zipvl_compile.report.compile_report import collect
from zipvl_compile.report.requests import RequestStats, now
from zipvl_compile.report.stats import stats

Document = tuple[str, Any]
"""Task and number of a document."""


class TimedCalls:
    """A model of Hugging Face whose calls are measured, and that is the model otherwise."""

    def __init__(self, model: Any, done: list[RequestStats]) -> None:
        """Append what each call does to a list."""
        self._model, self._done = model, done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = now()
        with collect() as compiled:
            out = self._model(*args, **kwargs)
        took, cache = now() - start, cache_of(out)
        held = stats(cache) if cache is not None and hasattr(cache, "layers") else None
        batch, length = out["logits"].shape[:2]
        self._done.append(
            RequestStats(
                model=type(self._model).__name__,
                batch=batch,
                prompt_tokens=length,
                new_tokens=0,
                prefill_ms=1e3 * took,
                decode_ms=None,
                compiled=len(compiled),
                cache=held,
            )
        )
        return out


class Asked:
    """Which documents each measurement is of; stands in the place of lmms-eval's documents meanwhile."""

    def __init__(
        self, documents: Any, done: list[RequestStats], keys: tuple = (), by_index: dict | None = None
    ) -> None:
        """Watch what is read of `documents[task][split][number]` before each entry of a list of measurements."""
        self._documents, self._done, self._keys = documents, done, keys
        self._by_index: dict[int, list[Document]] = defaultdict(list) if by_index is None else by_index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._documents, name)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, key: Any) -> Any:
        keys, found = (*self._keys, key), self._documents[key]
        if len(keys) < 3:
            return Asked(found, self._done, keys, self._by_index)
        self._by_index[len(self._done)].append((keys[0], key))
        return found

    def measured(self) -> dict[Document, list[RequestStats]]:
        """Return the measurements of each document, in the order in which it was asked about.

        Documents whose calls failed are read before the next measurement, too: its own are the last ones.
        """
        found: dict[Document, list[RequestStats]] = defaultdict(list)
        for index, one in enumerate(self._done):
            for document in self._by_index[index][-one.batch :]:
                found[document].append(one)
        return found


@contextlib.contextmanager
def documents_asked(lm: Any, done: list[RequestStats]) -> Iterator[Asked]:
    """Watch which documents a model of lmms-eval reads inside the `with` block."""
    documents = lm.task_dict
    lm.task_dict = asked = Asked(documents, done)
    try:
        yield asked
    finally:
        lm.task_dict = documents
