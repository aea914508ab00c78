"""The state of a solve, and margins: scores of samples, their KKT slack, and the duality gap that they add up to.

A sample with one active class keeps it unless W moves its scores by more than its KKT slack; a move of W by Δ changes
two scores against each other by at most ‖Δ_c − Δ_j‖ ‖φ‖. So only samples whose slack may be used up are read again.

The gap at W(α) is a sum of non-negative terms, an upper bound for any threshold τ_i and exact for the right one:

    gap = Σ_i C_i Σ_c [ (a_ic − γ q_ic)² / 2γ + q_ic max(τ_i − h_ic, 0) ],   h = z − max z,   a = max(h − τ, 0).   (1)

For γ = 0, τ = 0 and the first term vanishes.

Source: Crammer & Singer, JMLR 2001; (1) by Lagrangian duality from the smoothed loss (Blondel, Martins & Niculae 2020);
the bound is that of gap-safe screening (Ndiaye et al., JMLR 2017).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm.ascent import INT, columns, count_true, over, true_indices
from dualxda_jax.svm.config import Heuristics
from dualxda_jax.svm.problem import Array, contract
from dualxda_jax.svm.simplex import threshold

WIDE = jnp.float64


class Problem(NamedTuple):
    """What is solved; all of it is traced.

    Attributes:
        features: [n, D] with the constant feature among them.
        labels: [n] int32.
        cost: [n] float64; 0 leaves a sample out.
        smoothing: scalar float64 γ.
        tolerance: scalar float64, the relative gap to reach.
        max_epochs: scalar float64.
        samples: scalar float64, n without the rows that fill it up.
    """

    features: Array
    labels: Array
    cost: Array
    smoothing: Array
    tolerance: Array
    max_epochs: Array
    samples: Array


class Static(NamedTuple):
    """What a program is compiled for, besides shapes: k, rows of the working set, rows read at once, the constants."""

    num_classes: int
    room: int
    chunk: int
    heuristics: Heuristics


class State(NamedTuple):
    """Where a solve stands.

    Attributes:
        weights: [k, D] float64 W(α).
        simplex: [k, n] float64 q, with α_i = C_i (e_{y_i} − q_i).
        slack: [n] float32, a lower bound of the KKT slack: by how much the only active class leads all others, less γ;
            negative for free samples and violators.
        norms: [n] float32 ‖φ_i‖.
        gap: scalar, the absolute duality gap; infinite before margins are first recomputed.
        primal: scalar objective.
        target: scalar, the relative gap at which the next rounding sweep is due.
        cursor: scalar int32, where the next working set begins.
        passes: scalar int32, rounds that still sweep over all samples.
        rounds: scalar int32.
        left: scalar int32, rounds that the rounding sweep under way still takes; 0 outside of one.
        roundings: scalar int32, rounding sweeps so far.
        poor: scalar int32, rounds that stagnated.
        visits: scalar float64, rows read.
        status: scalar int32, one of the values below.
    """

    weights: Array
    simplex: Array
    slack: Array
    norms: Array
    gap: Array
    primal: Array
    target: Array
    cursor: Array
    passes: Array
    rounds: Array
    left: Array
    roundings: Array
    poor: Array
    visits: Array
    status: Array

    @property
    def dual(self) -> Array:
        """The dual objective."""
        return self.primal - self.gap


def one_hot(labels: Array, k: int) -> Array:
    """[k, b] bool."""
    return labels[None, :] == jnp.arange(k, dtype=labels.dtype)[:, None]


def take_rows(features: Array, index: Array) -> Array:
    """Rows in the precision of the sweeps: float64 for float64 features, else float32."""
    x = jnp.take(features, index, axis=0, mode="clip")
    return x if x.dtype == WIDE else x.astype(jnp.float32)


def scores_of(problem: Problem, weights: Array, x: Array, at_label: Array, precise: Array) -> Array:
    """[k, b] float64 scores with the margin of rows x; by a float64 product where `precise`."""
    exact = lambda: contract(weights, x.astype(WIDE), 1, 1)  # noqa: E731
    if problem.features.dtype == WIDE:
        plain = exact()
    else:
        plain = lax.cond(precise, exact, lambda: contract(weights.astype(x.dtype), x, 1, 1).astype(WIDE))
    return plain + jnp.where(at_label, 0.0, 1.0)


def recompute(
    problem: Problem, state: State, weights: Array, simplex: Array, slack: Array, precise: Array, static: Static
) -> tuple[Array, Array, Array]:
    """Margins of the samples whose slack the move of W may have used up.

    Args:
        problem: the data.
        state: with the slacks at its own weights.
        weights: [k, D] the new W.
        simplex: [k, n] the new q.
        slack: [n] the state's, −∞ where q is new.
        precise: scalar bool, by float64 products.
        static: sizes.

    Returns:
        Slacks [n], the absolute gap, and how many samples were read.
    """
    heuristics, n, k = static.heuristics, slack.shape[0], static.num_classes
    # A sample has one class compared with another: the two rows of W that moved most bound what is left of its slack.
    two = lambda w: jnp.sqrt(2.0 * jnp.sum(lax.top_k(jnp.sum(w * w, axis=1), 2)[0]))  # noqa: E731
    units = heuristics.units + weights.shape[1] * heuristics.units_a_feature
    unit = jnp.where(precise, 0.0, float(jnp.finfo(jnp.float32).eps) * units * two(weights)).astype(jnp.float32)
    reach = ((1.0 + heuristics.kept) * two(weights - state.weights)).astype(jnp.float32)
    kept = slack - heuristics.kept * jnp.abs(slack) - reach * state.norms
    size = static.chunk
    doubt, number, _ = true_indices(~(kept > 0.0), -(-n // size) * size)

    def look(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        slack, gap = carry
        i, there = columns(doubt, j, size), j * size + jnp.arange(size, dtype=INT) < number
        x, at_label = take_rows(problem.features, i), one_hot(jnp.take(problem.labels, i, mode="clip"), k)
        cost = jnp.where(there, jnp.take(problem.cost, i, mode="clip"), 0.0)
        q, z = jnp.take(simplex, i, axis=1, mode="clip"), scores_of(problem, weights, x, at_label, precise)
        h, gamma = z - jnp.max(z, axis=0)[None, :], problem.smoothing
        tau = threshold(h, gamma, heuristics.projection_steps)[None, :]
        bend = (jnp.maximum(h - tau, 0.0) - gamma * q) ** 2 / jnp.maximum(2.0 * gamma, float(jnp.finfo(WIDE).tiny))
        gap = gap + jnp.sum(cost * jnp.sum(bend + q * jnp.maximum(tau - h, 0.0), axis=0))
        inside = q > 0.0
        least = jnp.min(jnp.where(inside, h, jnp.inf), axis=0)
        ahead = least - jnp.max(jnp.where(inside, -jnp.inf, h), axis=0) - gamma
        # What float32 products may have lost is taken off here, as later rounds no longer know how a slack was found.
        lost = (unit * jnp.take(state.norms, i, mode="clip")).astype(WIDE)
        ahead = ahead - jnp.where(problem.features.dtype == WIDE, 0.0, lost)
        single = count_true(inside, WIDE, axis=0) == 1.0
        new = jnp.where(single, ahead, jnp.minimum(least, -float(jnp.finfo(jnp.float32).tiny)))
        new = jnp.where(cost > 0.0, new, float(jnp.finfo(jnp.float32).max))
        return slack.at[jnp.where(there, i, n)].set(new.astype(jnp.float32), mode="drop"), gap

    slack, gap = over((number + size - 1) // size, look, (kept, jnp.zeros((), WIDE)))
    return slack, gap, number
