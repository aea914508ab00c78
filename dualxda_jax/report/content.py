"""What a report shows, as plain data: no network, no solver, only arrays and text.

Letters: h rows, w columns, c channels (1 grey, 3 RGB). Images lie in [0, 1]; relevance maps may have any sign and are
summed over channels when drawn. Arrays may be NumPy's or JAX's.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from dualxda_jax import _check


@dataclasses.dataclass(frozen=True)
class Pair:
    """A training sample and what it contributes to one query.

    Attributes:
        index: its place in the training set.
        label: its label, 0..k-1.
        score: its attribution, positive for a proponent and negative for an opponent.
        image: [h, w, c] the training image.
        test_map: [h, w, c] relevance of the pair at the test image.
        train_map: [h, w, c] relevance of the pair at the training image.
    """

    index: int
    label: int
    score: float
    image: Any
    test_map: Any
    train_map: Any


@dataclasses.dataclass(frozen=True)
class Query:
    """A test image, its prediction, and the training samples behind it.

    Attributes:
        index: its place in the test set.
        image: [h, w, c].
        label: its true label, 0..k-1.
        target: the class the network predicts, which all scores and maps here explain.
        surrogate_logit: the surrogate's logit of the target, the sum of the scores of all training samples.
        heatmap: [h, w, c] the surrogate's own relevance for the target.
        proponents: strongest first.
        opponents: strongest (most negative) first.
    """

    index: int
    image: Any
    label: int
    target: int
    surrogate_logit: float
    heatmap: Any
    proponents: tuple[Pair, ...] = ()
    opponents: tuple[Pair, ...] = ()

    @property
    def right(self) -> bool:
        """Whether the network predicts the true label."""
        return self.label == self.target


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the run: its seconds, and "computed" or "reused"."""

    name: str
    seconds: float
    note: str = "computed"


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A training sample that speaks for its label mostly by itself, as mislabelled ones do.

    Attributes:
        index: its place in the training set.
        image: [h, w, c].
        label: the label that it carries.
        predicted: the class that the network predicts for it.
        self_influence: its attribution to itself.
    """

    index: int
    image: Any
    label: int
    predicted: int
    self_influence: float


@dataclasses.dataclass(frozen=True)
class Report:
    """One page.

    Attributes:
        title: heading.
        dataset: name of the data, for the running text.
        class_names: one a class.
        stages: in the order they ran.
        facts: (name, value as text, one line that explains it).
        queries: explained test images.
        suspects: most suspicious first.
        environment: lines of text: versions, device, seed.
    """

    title: str
    dataset: str
    class_names: tuple[str, ...]
    stages: tuple[Stage, ...] = ()
    facts: tuple[tuple[str, str, str], ...] = ()
    queries: tuple[Query, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    environment: tuple[str, ...] = ()


def check(report: Report) -> None:
    """Check all that drawing relies on.

    Raises:
        ValueError: an image or map of a wrong shape, out of range or not finite; a label without a class name; a name
            that is no text. The message names the place, as "queries[3].proponents[0].train_map".
    """
    check_names(report.class_names)
    for i, query in enumerate(report.queries):
        check_query(f"queries[{i}]", query, report.class_names)
    for i, suspect in enumerate(report.suspects):
        place = f"suspects[{i}]"
        _labels(place, suspect, ("label", "predicted"), report.class_names)
        _image(f"{place}.image", suspect.image)
        _number(f"{place}.self_influence", suspect.self_influence)


def check_names(class_names: Sequence[str]) -> None:
    """Check that classes have names that can be written.

    Raises:
        ValueError: one that is no text, or not in Unicode.
    """
    for c, name in enumerate(class_names):
        if not isinstance(name, str):
            _check.fail(f"class_names[{c}]", f"a {type(name).__name__}", "text")
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            _check.fail(f"class_names[{c}]", ascii(name), "text without halves of characters (surrogates)")


def check_query(place: str, query: Query, class_names: Sequence[str]) -> None:
    """Check a query as `check` does; `place` is what messages call it."""
    _labels(place, query, ("label", "target"), class_names)
    _image(f"{place}.image", query.image)
    _map(f"{place}.heatmap", query.heatmap, query.image)
    _number(f"{place}.surrogate_logit", query.surrogate_logit)
    for group in ("proponents", "opponents"):
        for j, pair in enumerate(getattr(query, group)):
            _pair(f"{place}.{group}[{j}]", pair, query, class_names)


def _pair(place: str, pair: Pair, query: Query, class_names: Sequence[str]) -> None:
    _labels(place, pair, ("label",), class_names)
    _image(f"{place}.image", pair.image)
    _map(f"{place}.test_map", pair.test_map, query.image)
    _map(f"{place}.train_map", pair.train_map, pair.image)
    _number(f"{place}.score", pair.score)


def _labels(place: str, item: Any, fields: Sequence[str], class_names: Sequence[str]) -> None:
    for field in fields:
        value = getattr(item, field)
        try:
            known = 0 <= operator.index(value) < len(class_names)
        except TypeError:  # no integer
            known = False
        if not known:
            _check.fail(
                f"{place}.{field}", value, f"in 0..{len(class_names) - 1}, there are {len(class_names)} class names"
            )


def _image(place: str, image: Any) -> None:
    shape = np.shape(image)
    if len(shape) != 3 or shape[2] not in (1, 3) or 0 in shape:
        _check.fail(place, f"shape {shape}", "[h, w, 1] or [h, w, 3]")
    values = np.asarray(image, np.float64)
    # Comparisons with NaN are false, so that this refuses NaN as well.
    if not (values.min() >= -1e-6 and values.max() <= 1.0 + 1e-6):
        _check.fail(place, f"values in {values.min():.3g}..{values.max():.3g}", "in 0..1")


def _map(place: str, relevance: Any, image: Any) -> None:
    shape, expected = np.shape(relevance), np.shape(image)[:2]
    if len(shape) != 3 or shape[:2] != expected:
        _check.fail(place, f"shape {shape}", f"[{expected[0]}, {expected[1]}, c] like its image")
    _finite(place, relevance)


def _number(place: str, value: Any) -> None:
    if np.ndim(value):
        _check.fail(place, f"shape {np.shape(value)}", "a number")
    _finite(place, value)


def _finite(place: str, values: Any) -> None:
    bad = np.size(values) - np.count_nonzero(np.isfinite(np.asarray(values, np.float64)))
    if bad:
        _check.fail(place, f"{bad} NaN or infinite values", "finite")
