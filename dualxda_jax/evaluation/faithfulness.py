"""How closely the surrogate stands in for the network that it explains."""

import dataclasses
from typing import Any

import jax
import numpy as np

from dualxda_jax import _check


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Faithfulness:
    """Agreement of the network's head and the surrogate; 1 is perfect in all four.

    Attributes:
        weight_cosine: scalar, cosine of the two weight matrices, row by row, averaged over the classes.
        logit_correlation: scalar, Pearson's correlation of all logits of all queries.
        matthews: scalar, Matthews correlation (multi-class) of the predicted classes.
        kendall_tau: scalar, Kendall's τ-b of the logits of a query, averaged over the queries.
    """

    weight_cosine: float
    logit_correlation: float
    matthews: float
    kendall_tau: float


def surrogate_faithfulness(
    network_weights: Any, surrogate_weights: Any, network_logits: Any, surrogate_logits: Any
) -> Faithfulness:
    """Four measures of the agreement between the network's head and its surrogate, on the host in float64.

    What has no value is nan, never a number that looks like one: `logit_correlation` if either side's logits are all
    equal; `matthews` if either side predicts one class only. Classes with a zero weight row on either side (they have
    no direction) and queries with all logits equal on either side (they have no order) are left out of their means; the
    mean is nan if none is left.

    Args:
        network_weights: [k, d] of the final linear layer, a row a class.
        surrogate_weights: [k, d].
        network_logits: [q, k].
        surrogate_logits: [q, k].

    Returns:
        The four measures.

    Raises:
        ValueError: shapes that do not fit each other, fewer than 2 classes, no query, NaN or infinite entries.

    Source: arXiv 2402.12118, faithfulness of the surrogate; Gorodkin 2004 for the multi-class Matthews correlation.
    """
    weights = _pair(("network_weights", network_weights), ("surrogate_weights", surrogate_weights), ("k", "d"))
    logits = _pair(("network_logits", network_logits), ("surrogate_logits", surrogate_logits), ("q", "k"))
    k = weights[0].shape[0]
    if k < 2:
        _check.fail("network_weights", f"{k} rows", "at least 2, one a class")
    if logits[0].shape[1] != k:
        _check.fail("network_logits", f"shape {logits[0].shape}", f"[q, {k}], a column for each row of the weights")
    return Faithfulness(
        weight_cosine=_row_cosine(*weights),
        logit_correlation=_pearson(*logits),
        matthews=_matthews(logits[0].argmax(axis=1), logits[1].argmax(axis=1), k),
        kendall_tau=_kendall(*logits),
    )


def _pair(
    network: tuple[str, Any], surrogate: tuple[str, Any], letters: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    _check.shape(*network, letters)
    _check.shape(*surrogate, np.shape(network[1]))
    for name, values in (network, surrogate):
        if 0 in np.shape(values):
            _check.fail(name, f"shape {np.shape(values)}", "not empty")
        bad = np.size(values) - np.count_nonzero(np.isfinite(np.asarray(values, np.float64)))
        if bad:
            _check.fail(name, f"{bad} NaN or infinite entries", "finite")
    return np.asarray(network[1], np.float64), np.asarray(surrogate[1], np.float64)


def _row_cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    defined = norms > 0.0
    if not defined.any():
        return float("nan")
    return float(np.mean(np.sum(a * b, axis=1)[defined] / norms[defined]))


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def _matthews(a: np.ndarray, b: np.ndarray, k: int) -> float:
    total, agree = float(a.size), float(np.count_nonzero(a == b))
    in_a, in_b = np.bincount(a, minlength=k).astype(np.float64), np.bincount(b, minlength=k).astype(np.float64)
    spread = (total**2 - in_a @ in_a) * (total**2 - in_b @ in_b)
    if spread == 0.0:
        return float("nan")
    return float((agree * total - in_a @ in_b) / np.sqrt(spread))


def _kendall(a: np.ndarray, b: np.ndarray) -> float:
    # Loading scipy.stats takes longer than importing this package.
    from scipy.stats import kendalltau

    ordered = (np.ptp(a, axis=1) > 0.0) & (np.ptp(b, axis=1) > 0.0)
    if not ordered.any():
        return float("nan")
    return float(np.mean([kendalltau(x, y).statistic for x, y in zip(a[ordered], b[ordered], strict=True)]))
