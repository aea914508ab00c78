"""Every pytree that crosses a room's border.

Letters, here and in every docstring of the package:
n training samples, q queries, k classes, d features, s support vectors, m costs, b a batch.

All are frozen dataclasses registered with JAX. Fields marked static are part of the tree's structure, not leaves:
they stay Python values under `jit` and `vmap`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Array = jax.Array
Params = Any
"""A pytree of arrays: whatever the model's `init` returned."""

FeatureFn = Callable[[Params, Array], Array]
"""(params, x[b, ...]) -> features[b, d]: the input of the network's final linear layer."""

Progress = Callable[[int, int], None]
"""Called on the host with (steps done, steps in all) while long work runs."""


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageData:
    """Labelled images on the host.

    Attributes:
        images: [n, h, w, c] uint8 in 0..255, or float32 where the files held floats.
        labels: [n] int32 in 0..k-1.
    """

    images: np.ndarray
    labels: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Some samples, filled up to a fixed size.

    Attributes:
        inputs: [b, ...] samples in the dtype they came in.
        labels: [b] integers in 0..k-1.
        mask: [b] bool, True for real rows; the others are zeros.
    """

    inputs: np.ndarray | Array
    labels: np.ndarray | Array
    mask: np.ndarray | Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """Penultimate features of a data set.

    Attributes:
        values: [n, d] inputs of the final linear layer.
        labels: [n] integers in 0..k-1.
    """

    values: Array
    labels: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolveInfo:
    """How a solve ended.

    Attributes:
        primal: scalar, the primal objective at `weights`.
        dual: scalar, the dual objective at `coefficients`; never above `primal`.
        gap: scalar, (primal - dual) / max(|primal|, tiny), the relative duality gap.
        epochs: scalar integer, passes done.
        converged: scalar bool, gap <= tolerance. False for NaN and for a solve that ran out of epochs.
    """

    primal: Array
    dual: Array
    gap: Array
    epochs: Array
    converged: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DualSolution:
    """Dual variables of the Crammer-Singer SVM and the surrogate that they make.

    Attributes:
        coefficients: [n, k] dual variables; rows sum to 0, at most cost at the label, at most 0 elsewhere.
        weights: [k, d] = coefficientsᵀ · features.
        intercept: [k] added to the logits: intercept_scaling² · Σ_i coefficients_i.
        intercept_scaling: static, the constant feature b appended to every sample; 0 means none.
        info: how the solve ended.
    """

    coefficients: Array
    weights: Array
    intercept: Array
    intercept_scaling: float = dataclasses.field(metadata=_STATIC)
    info: SolveInfo


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SupportModel:
    """A `DualSolution` reduced to its support vectors: all that attribution needs.

    Attributes:
        coefficients: [s, k] dual variables of the support vectors.
        features: [s, d] their features.
        labels: [s] their labels.
        index: [s] their places in the training set, ascending.
        weights: [k, d] the surrogate's weights.
        intercept: [k] the surrogate's intercept.
        intercept_scaling: static, see `DualSolution`.
        train_size: static, n.
    """

    coefficients: Array
    features: Array
    labels: Array
    index: Array
    weights: Array
    intercept: Array
    intercept_scaling: float = dataclasses.field(metadata=_STATIC)
    train_size: int = dataclasses.field(metadata=_STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """The k highest (or lowest) scores of each query.

    Attributes:
        scores: [q, k] best first.
        index: [q, k] places in the training set.
    """

    scores: Array
    index: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairRelevance:
    """The two heat maps of a (test, train) pair; each sums to the pair's score up to what the rules absorb.

    Attributes:
        test: array like the test input, relevance in units of the score.
        train: array like the training input.
        score: scalar, coefficient · ⟨φ(x_train), φ(x_test)⟩.
    """

    test: Array
    train: Array
    score: Array


@dataclasses.dataclass(frozen=True)
class FeatureModel:
    """A network seen as features and a linear head.

    Attributes:
        features: (params, x[b, ...]) -> [b, d], the input of the head.
        logits: (params, x[b, ...]) -> [b, k], the network's own output.
        head: path of the final linear layer, as "dense_2" or "decoder/head".
    """

    features: FeatureFn
    logits: Callable[[Params, Array], Array]
    head: str
