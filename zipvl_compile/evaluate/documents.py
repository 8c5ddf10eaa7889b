"""Long texts that come with Python and with what this package needs, split into those to choose by and to report.

Nothing is downloaded. Whoever tunes an option looks at "choose" alone; results are of "report". A document's split is
its place in the table, so neither a package that is missing nor a new line at the end moves another document.
The texts are those of the installed versions: compare numbers of one environment only.
"""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable
from importlib.resources import files
from typing import NamedTuple

SPLITS = ("report", "choose")
#: Where a text is: "topic" of Python's help, "doc" of a Python object, or a file of a package.
SOURCES = (
    "topic types", "topic execmodel", "doc numpy.nditer", "doc numpy.fft",
    "doc scipy.optimize.minimize", "doc scipy.optimize.differential_evolution",
    "doc sympy.solvers.ode.ode", "doc sympy.combinatorics.permutations.Permutation",
    "topic string-methods", "topic typesseq",
    "doc sklearn.ensemble.RandomForestClassifier", "doc sklearn.linear_model.LogisticRegression",
    "doc torch.nn.functional.scaled_dot_product_attention", "doc torch.nn.CrossEntropyLoss",
    "topic debugger", "topic import", "doc scipy.stats", "doc scipy.stats.permutation_test",
    "file sklearn.datasets.descr/twenty_newsgroups.rst", "doc sklearn.manifold.TSNE",
    "topic attribute-access", "topic customization", "doc numpy.einsum", "doc numpy.loadtxt",
    "topic assignment", "topic comparisons", "doc sympy.lambdify", "doc sympy.solve",
    "doc torch.nn.LSTM", "doc torch.compile",
    "doc sklearn.model_selection.GridSearchCV", "doc sklearn.ensemble.HistGradientBoostingClassifier",
    "topic strings", "topic typesmapping", "doc scipy.optimize.linprog", "doc scipy.signal.resample",
    "topic try", "topic calls", "doc numpy.pad", "doc scipy.stats.bootstrap",
)  # fmt: skip


class Document(NamedTuple):
    """A text and where it comes from."""

    name: str
    text: str


def documents(split: str) -> list[Document]:
    """Return the documents of a split that are installed, in the order of the table.

    Args:
        split: "report" (every second line of the table, from the first) or "choose" (the others).

    Raises:
        ValueError: another split.
    """
    if split not in SPLITS:
        raise ValueError(f"--split: expected {' or '.join(SPLITS)}, got {split!r}. Report what was not chosen by.")
    texts = ((source, _text(source)) for source in SOURCES[SPLITS.index(split) :: 2])
    return [Document(source, text) for source, text in texts if text]


def _text(source: str) -> str | None:
    kind, _, name = source.partition(" ")
    return _READ[kind](name)


def _topic(name: str) -> str | None:
    from pydoc_data.topics import topics

    return topics.get(name)


def _doc(name: str) -> str | None:
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport:
        return None
    return None if found is None else inspect.getdoc(found)


def _file(name: str) -> str | None:
    package, _, path = name.partition("/")
    try:
        return files(package).joinpath(path).read_text(encoding="utf-8")
    except (ImportError, OSError):
        return None


_READ: dict[str, Callable[[str], str | None]] = {"topic": _topic, "doc": _doc, "file": _file}
