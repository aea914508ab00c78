"""Checks that the influence functions share. Values are looked at outside of a trace only."""

from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.baselines.influence import hvp
from dualxda_jax.baselines.protocol import Context
from dualxda_jax.types import Array


def nonnegative(argument: str, value: float) -> float:
    """The number as one of Python, whose type bends to that of arrays; raise unless it is finite and at least 0."""
    if not (_check.is_real(value) and value >= 0):
        _check.fail(argument, value, "a finite number, at least 0")
    return float(value)


def positive(argument: str, value: float) -> float:
    """The same for a number above 0."""
    if nonnegative(argument, value) == 0:
        _check.fail(argument, value, "above 0")
    return float(value)


def one_of(argument: str, value: str, names: tuple[str, ...]) -> None:
    """Raise unless it is one of the names."""
    if value not in names:
        _check.fail(argument, repr(value), f"one of {', '.join(names)}")


def finite_scores(scores: Array) -> Array:
    """Hand scores [q, n] on; NaN or Inf in them name the queries or the training samples that they come from."""
    if _check.is_traced(scores) or bool(jnp.isfinite(scores).all()):
        return scores
    fine = np.isfinite(np.asarray(scores))
    if not fine.any():
        _check.fail("scores", "NaN or Inf everywhere", "finite")
    queries, samples = ~fine.any(axis=1), ~fine.any(axis=0)
    if queries.any():
        _fail("gradients of the queries", np.flatnonzero(queries))
    _fail("gradients of the training samples", np.flatnonzero(samples if samples.any() else ~fine.all(axis=0)))


def finite_samples(values: Array) -> Array:
    """Hand one value a sample [n] on; NaN or Inf name the samples."""
    if not _check.is_traced(values) and not bool(jnp.isfinite(values).all()):
        _fail("gradients of the training samples", np.flatnonzero(~np.isfinite(np.asarray(values))))
    return values


def finite_training(context: Context, config: hvp.Config, *results: Array) -> None:
    """If a result is not finite, name the training samples whose gradients are not, if that is why.

    A curvature is a mean over all samples, and shows no more which of them made it NaN.
    """
    if any(_check.is_traced(result) for result in results):
        return
    if not all(bool(jnp.isfinite(result).all()) for result in results):
        finite_samples(hvp.gradient_sums(context, config))


def _fail(argument: str, places: np.ndarray) -> NoReturn:
    first = ", ".join(map(str, places[:5]))
    _check.fail(argument, f"NaN or Inf at {len(places)} (first: {first})", "finite")


def finite_state(bad: Array) -> None:
    """Raise if a fold met NaN or Inf; bad [2] is how many samples had any and the first of them."""
    if not isinstance(bad, jax.core.Tracer) and int(bad[0]):
        _check.fail("gradients of the training samples", f"NaN or Inf at {bad[0]} (first: {bad[1]})", "finite")
