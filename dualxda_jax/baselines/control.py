"""Scores that say nothing: what any method must beat."""

import dataclasses

import jax
import jax.numpy as jnp

from dualxda_jax.baselines.protocol import Context, Method, check_queries
from dualxda_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """A key.

    Attributes:
        context: what was not learnt from.
        key: typed key.
    """

    context: Context
    key: Array


def random() -> Method:
    """Independent standard normal scores, made from the key of `fit`.

    A query's scores depend on the key, its input and its target alone: equal queries get equal scores, in whatever
    chunks. Self-influence is standard normal too.
    """
    return Method("random", lambda key, context: Fitted(context, key), _scores, _self_influence)


def _scores(fitted: Fitted, x: Array, targets: Array) -> Array:
    targets = check_queries(fitted.context, x, targets)
    return _normal(fitted, jnp.asarray(x), targets)


@jax.jit
def _normal(fitted: Fitted, x: Array, targets: Array) -> Array:
    words = jnp.asarray(x, jnp.float32).reshape(x.shape[0], -1).view(jnp.uint32)
    # Any odd multipliers do: different inputs shall give different sums, modulo 2³².
    odd = 2 * jax.random.bits(jax.random.key(0), words.shape[1:], jnp.uint32) + 1
    content = (words * odd[None, :]).sum(axis=1, dtype=jnp.uint32)

    def one(content: Array, target: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(fitted.key, content), target)
        return jax.random.normal(key, fitted.context.labels.shape, jnp.float32)

    return jax.lax.map(lambda pair: one(*pair), (content, targets))


def _self_influence(fitted: Fitted) -> Array:
    return jax.random.normal(jax.random.fold_in(fitted.key, 0), fitted.context.labels.shape, jnp.float32)
