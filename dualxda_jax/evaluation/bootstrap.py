"""How sure is a mean over queries? The bootstrap's answer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualxda_jax import _check
from dualxda_jax.types import Array

_AT_ONCE = 1 << 22


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and where it would lie had other queries been drawn.

    Attributes:
        mean: scalar, of the values that are defined; nan if none is.
        low: scalar, lower end of the interval.
        high: scalar, upper end.
        defined: scalar integer, how many values are not nan.
    """

    mean: Array
    low: Array
    high: Array
    defined: Array


def bootstrap(values: Any, key: Array, *, resamples: int = 1000, level: float = 0.95) -> Interval:
    """Percentile interval of a mean, by drawing as many values with replacement again and again.

    Values that are nan (a query without any ranking, say) are left out, and `defined` says how many remain. The
    interval speaks of the draw of the values alone: the network, its training and the method stay what they are.

    Args:
        values: [q] one for each query.
        key: typed key.
        resamples: how many means are drawn.
        level: share of them between the ends, in 0..1.

    Returns:
        The interval. One value has the interval of that value; none gives nan.

    Raises:
        ValueError: values that are not [q] with q of at least 1, an untyped key, resamples < 1, level outside 0..1;
            infinite values.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    _check.shape("values", values, ("q",))
    q = np.shape(values)[0]
    if q == 0:
        _check.fail("values", "none", "[q] with q of 1 or more")
    check_bootstrap(key, resamples, level)
    if not _check.is_traced(values) and np.isinf(np.asarray(values)).any():
        _check.fail(
            "values", f"{np.count_nonzero(np.isinf(np.asarray(values)))} infinite", "finite, or nan where undefined"
        )
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.float32)
    return _bootstrap(values, key, resamples=int(resamples), level=float(level))


def check_bootstrap(key: Array, resamples: int, level: float) -> None:
    """Refuse what no bootstrap can be made with."""
    _check.key("key", key)
    if resamples < 1:
        _check.fail("resamples", resamples, "1 or more")
    if not 0 < level < 1:
        _check.fail("level", level, "between 0 and 1")


@functools.partial(jax.jit, static_argnames=("resamples", "level"))
def _bootstrap(values: Array, key: Array, *, resamples: int, level: float) -> Interval:
    q = values.shape[0]
    known = ~jnp.isnan(values)
    defined = jnp.sum(known, dtype=jnp.int32)
    # The defined ones first: a draw below `defined` then never meets the others, however many there are.
    ordered = values[jnp.argsort(~known)]
    used = jnp.arange(q, dtype=jnp.int32) < defined
    count = jnp.maximum(defined, 1).astype(values.dtype)
    # A rounded mean may lie beyond all values, and deviations from it lose less to rounding than the values themselves:
    # it is the origin, and what it errs by is found from them.
    origin = jnp.clip(
        jnp.where(known, values, 0).sum() / count,
        jnp.where(known, values, jnp.inf).min(),
        jnp.where(known, values, -jnp.inf).max(),
    )
    deviations = jnp.where(used, ordered - origin, 0)

    def one(key: Array) -> Array:
        rows = jax.random.randint(key, (q,), 0, jnp.maximum(defined, 1))
        return jnp.where(used, deviations[rows], 0).sum() / count

    means = lax.map(one, jax.random.split(key, resamples), batch_size=max(1, min(resamples, _AT_ONCE // q)))
    ends = jnp.asarray([(1 - level) / 2, (1 + level) / 2], values.dtype)
    low, high = jnp.quantile(means, ends)
    some = defined > 0
    nan = jnp.asarray(jnp.nan, values.dtype)
    mean, bottom, top = (jnp.where(some, origin + v, nan) for v in (deviations.sum() / count, low, high))
    return Interval(mean, bottom, top, defined)
