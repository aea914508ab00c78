"""Do relevance maps say something true? Two checks of maps by anyone, where the truth is known or can be made.

A planted shortcut is the reason for some predictions by construction, so a map of such a prediction has to lie on it.
And what a map calls relevant has to matter: without it the score falls.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualxda_jax import _check

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlippingCurve:
    """Scores while more and more pixels are removed, the most relevant first, and in random order for comparison.

    Attributes:
        fractions: [f] share of the pixels removed.
        scores: [b, f] score of each image, the most relevant pixels removed.
        random: [b, f] the same for pixels removed in random order, mean over the orders.
        original: [b] score of the untouched images.
        advantage: [b] mean over the fractions of (random − scores) / |original|: above 0 where the score falls faster
            than by chance; nan where the original score is 0.
    """

    fractions: Array
    scores: Array
    random: Array
    original: Array
    advantage: Array


def mark_relevance_share(maps: Any, mask: Any) -> Array:
    """The share of a map's positive relevance that falls on a mark.

    A random map has the mark's share of the pixels on average; a map of what the mark brought about should have
    far more.

    Args:
        maps: [b, h, w, c] relevance, for example both sides of the pairs that a shortcut drives.
        mask: [h, w] bool, the pixels of the mark; or [b, h, w], those of each map.

    Returns:
        [b] in 0..1; nan for a map without positive relevance.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    _check.shape("maps", maps, ("b", "h", "w", "c"))
    b, h, w, _ = np.shape(maps)
    mask = jnp.asarray(mask)
    if mask.shape not in ((h, w), (b, h, w)):
        _check.fail("mask", f"shape {mask.shape}", f"[{h}, {w}] or [{b}, {h}, {w}]")
    if mask.dtype != bool:
        _check.fail("mask", f"dtype {mask.dtype}", "bool")
    maps = jnp.asarray(maps)
    positive = jnp.maximum(maps, jnp.zeros((), maps.dtype)).sum(3)
    on_mark = jnp.where(jnp.broadcast_to(mask, positive.shape), positive, jnp.zeros((), positive.dtype))
    return on_mark.sum((1, 2)) / positive.sum((1, 2))


def pixel_flipping(
    score_fn: Callable[[Array], Array],
    x: Any,
    relevance: Any,
    key: Array,
    *,
    fractions: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.3),
    baseline: Any = 0.0,
    orders: int = 5,
) -> FlippingCurve:
    """Remove pixels, the most relevant first, and see how fast the score falls, against pixels in random order.

    The score of a pair falls with either of its sides: hold the one and let score_fn take the other. Where the score is
    negative (an opponent), hand in its negative and that of the relevance.

    Args:
        score_fn: images [b, h, w, c] -> scores [b]; the larger, the more there is to lose.
        x: [b, h, w, c] images.
        relevance: [b, h, w, c] their maps; a pixel's relevance is the sum over its channels.
        key: typed PRNG key of the random orders.
        fractions: shares of the pixels to remove, each in 0..1.
        baseline: what a removed pixel becomes: a number, or an array that broadcasts to x (a mean image).
        orders: random orders for each image.

    Returns:
        The curves and by how much the relevant pixels are ahead. Equal relevance: the earlier pixel goes first.

    Raises:
        ValueError: shapes that do not fit, no image, an untyped key, NaN in the relevance where its values are known,
            fractions outside 0..1 or none, orders below 1, scores that are not [b].

    Source: Samek et al. 2017 (pixel flipping), here for the score of a pair.
    """
    _check.shape("x", x, ("b", "h", "w", "c"))
    if 0 in np.shape(x):
        _check.fail("x", f"shape {np.shape(x)}", "[b, h, w, c] with at least one image and one pixel")
    _check_relevance(relevance, np.shape(x))
    _check_baseline(baseline, np.shape(x))
    _check.key("key", key)
    shares = np.asarray(fractions, np.float64)
    if shares.ndim != 1 or shares.size == 0 or not ((shares >= 0) & (shares <= 1)).all():
        _check.fail("fractions", fractions, "numbers in 0..1, at least one")
    _check.positive_integer("orders", orders)
    x, relevance = jnp.asarray(x), jnp.asarray(relevance)
    out = jax.eval_shape(score_fn, x)
    if getattr(out, "shape", None) != x.shape[:1]:
        _check.fail("score_fn", f"output {out}", f"scores [{x.shape[0]}]")
    b, h, w, _ = x.shape
    background = jnp.broadcast_to(jnp.asarray(baseline, x.dtype), x.shape)
    counts = jnp.asarray(np.rint(shares * h * w).astype(np.int32))

    def curve(importance: Array) -> Array:
        """[f, b] scores when pixels go in the order of their importance [b, h·w]."""
        rank = jnp.argsort(jnp.argsort(-importance, axis=1), axis=1).reshape(b, h, w, 1)
        # One fraction at a time: memory stays that of one batch.
        return lax.map(lambda count: score_fn(jnp.where(rank < count, background, x)), counts)

    scores = curve(relevance.sum(3).reshape(b, h * w)).T
    random = lax.map(lambda k: curve(jax.random.uniform(k, (b, h * w))), jax.random.split(key, orders)).mean(0).T
    original = score_fn(x)
    advantage = (random - scores).mean(1) / jnp.abs(original)
    advantage = jnp.where(original == 0, jnp.asarray(jnp.nan, advantage.dtype), advantage)
    return FlippingCurve(jnp.asarray(shares, original.dtype), scores, random, original, advantage)


def _check_relevance(relevance: Any, shape: tuple[int, ...]) -> None:
    _check.shape("relevance", relevance, shape)
    _check.numbers("relevance", relevance)
    if not _check.is_traced(relevance):
        # What is NaN is neither more nor less relevant than anything: there is no order to go by.
        bad = np.flatnonzero(np.isnan(np.asarray(relevance)).any((1, 2, 3)))
        if bad.size:
            _check.fail("relevance", f"NaN in {bad.size} maps, first in row {bad[0]}", "numbers")


def _check_baseline(baseline: Any, shape: tuple[int, ...]) -> None:
    _check.numbers("baseline", baseline)
    got = np.shape(baseline)
    if len(got) > len(shape) or any(g not in (1, n) for g, n in zip(got[::-1], shape[::-1], strict=False)):
        _check.fail("baseline", f"shape {got}", f"a number, or an array that broadcasts to {shape}")
