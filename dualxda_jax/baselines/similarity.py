"""Similarity to the query, signed by whether the label is the target."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax import _check
from dualxda_jax.baselines.gradients import check_finite, map_forward
from dualxda_jax.baselines.protocol import Context, Method, check_queries
from dualxda_jax.baselines.rows import products, wide
from dualxda_jax.types import Array

SPACES = ("features", "inputs")
MEASURES = ("dot", "cos", "l2")


@dataclasses.dataclass(frozen=True)
class Config:
    """Static options of `similarity`; see there."""

    space: str = "features"
    measure: str = "dot"
    chunk: int = 256

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            _check.fail("space", repr(self.space), f"one of {', '.join(SPACES)}")
        if self.measure not in MEASURES:
            _check.fail("measure", repr(self.measure), f"one of {', '.join(MEASURES)}")
        _check.positive_integer("chunk", self.chunk)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """Points of the training samples.

    Attributes:
        context: what was learnt from.
        points: [n, d] features or flattened inputs.
    """

    context: Context
    points: Array


def similarity(space: str = "features", measure: str = "dot", *, chunk: int = 256) -> Method:
    """Score s · sim(i, x): s is +1 where the label of i is the target and −1 elsewhere.

    sim is ⟨φ_i, φ⟩ ("dot"), the cosine ("cos", 0 for a zero vector) or 1 / (1 + ‖φ_i − φ‖) ("l2": the nearest sample of
    the target's class comes first, the nearest of another class last). Self-influence is sim(i, i), which says how
    large a sample is ("dot") or nothing ("cos", "l2").

    Args:
        space: "features", the penultimate ones, or "inputs".
        measure: "dot", "cos" or "l2".
        chunk: samples that the network sees at once.

    Raises:
        ValueError: an unknown space or measure, a chunk below 1; in `fit`, a context without features.

    Source: Hanawa et al. 2021 compare such measures; the sign is the DualXDA paper's.
    """
    config = Config(space, measure, chunk)
    name = "similarity" if (space, measure) == ("features", "dot") else f"similarity_{space}_{measure}"
    return Method(
        name,
        functools.partial(_fit, config),
        functools.partial(_scores, config),
        functools.partial(_self_influence, config),
    )


def features(context: Context, x: Array, chunk: int) -> Array:
    """Penultimate features [b, d] of any number of inputs, computed chunk by chunk.

    Raises:
        ValueError: the context has no feature function.
    """
    return _features(check_features(context).features, context.params, x, chunk)


def check_features(context: Context) -> Context:
    """The context, if it has a feature function."""
    if context.features is None:
        _check.fail("context.features", None, "the function that gives the input of the final layer")
    return context


@functools.partial(jax.jit, static_argnums=(0, 3))
def _features(feature_fn: Any, params: Any, x: Array, chunk: int) -> Array:
    return map_forward(lambda part: feature_fn(params, part), x, chunk)


def _points(config: Config, context: Context, x: Array) -> Array:
    if config.space == "features":
        return features(context, x, config.chunk)
    return jnp.asarray(x).reshape(x.shape[0], -1).astype(wide(x.dtype))


def _fit(config: Config, key: Array, context: Context) -> Fitted:
    points = _points(config, context, context.inputs)
    check_finite(config.space, points)
    return Fitted(context, points)


def _scores(config: Config, fitted: Fitted, x: Array, targets: Array) -> Array:
    targets = check_queries(fitted.context, x, targets)
    query = _points(config, fitted.context, jnp.asarray(x))
    return _signed(config.measure, query, fitted.points, targets, fitted.context.labels)


@functools.partial(jax.jit, static_argnums=0)
def _signed(measure: str, query: Array, points: Array, targets: Array, labels: Array) -> Array:
    sign = jnp.where(targets[:, None] == labels[None, :], 1, -1).astype(points.dtype)
    if measure == "l2":
        # About the mean, so that ‖a‖² + ‖b‖² − 2⟨a, b⟩ loses less where all points lie far from the origin.
        centre = points.mean(axis=0)[None, :]
        query, points = query - centre, points - centre
    inner = products(query, points, points.dtype)
    squares = [jnp.square(a).sum(axis=1) for a in (query, points)]
    if measure == "dot":
        return sign * inner
    if measure == "cos":
        norms = jnp.sqrt(squares[0])[:, None] * jnp.sqrt(squares[1])[None, :]
        # By what is 0, not by what is above it: NaN is neither, and is to stay.
        return sign * jnp.where(norms == 0, 0, inner / jnp.where(norms == 0, 1, norms))
    distance = jnp.sqrt(jnp.maximum(squares[0][:, None] + squares[1][None, :] - 2 * inner, 0))
    return sign / (1 + distance)


def _self_influence(config: Config, fitted: Fitted) -> Array:
    squares = jnp.square(fitted.points).sum(axis=1)
    if config.measure == "dot":
        return squares
    # 1, but 0 for zero vectors; NaN stays.
    return jnp.sign(squares) if config.measure == "cos" else jnp.ones_like(squares)
