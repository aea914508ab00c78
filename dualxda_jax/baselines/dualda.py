"""DualDA behind the protocol that its rivals share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dualxda_jax import _check, attribution, svm
from dualxda_jax.baselines.gradients import check_finite
from dualxda_jax.baselines.protocol import Context, Method, check_queries
from dualxda_jax.baselines.similarity import features
from dualxda_jax.types import Array, SupportModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """The surrogate.

    Attributes:
        context: what was learnt from.
        support: its support vectors.
    """

    context: Context
    support: SupportModel


def dualda(cost: float = 1e-3, *, config: svm.SolverConfig | None = None, chunk: int = 256) -> Method:
    """Score α_ic ⟨φ_i, φ(x)⟩, α the dual variables of the multi-class SVM on the features; c is the target.

    A query's scores sum over the samples to the surrogate's logit. Most are exactly 0. Self-influence is α_{i,y_i}
    ‖φ_i‖². `fit` runs on the host, because the number of support vectors depends on values: it cannot be traced.

    Args:
        cost: C of the SVM; smaller is sparser on separable features.
        config: of the solver; by default `svm.SolverConfig()`.
        chunk: samples that the network sees at once.

    Raises:
        ValueError: a chunk below 1; in `fit`, a context without features, or a cost that `svm.solve` refuses.

    Source: DualXDA, arXiv 2402.12118.
    """
    _check.positive_integer("chunk", chunk)
    settings = svm.SolverConfig() if config is None else config
    return Method("dualda", functools.partial(_fit, cost, settings, chunk), functools.partial(_scores, chunk), _self)


def _fit(cost: float, settings: svm.SolverConfig, chunk: int, key: Array, context: Context) -> Fitted:
    points = features(context, context.inputs, chunk)
    check_finite("features", points)
    solution = svm.solve(points, context.labels, num_classes=context.num_classes, cost=cost, config=settings)
    return Fitted(context, attribution.compress(points, context.labels, solution))


def _scores(chunk: int, fitted: Fitted, x: Array, targets: Array) -> Array:
    targets = check_queries(fitted.context, x, targets)
    query = features(fitted.context, jnp.asarray(x), chunk)
    return attribution.dense(fitted.support, attribution.scores(fitted.support, query, targets))


def _self(fitted: Fitted) -> Array:
    return attribution.dense(fitted.support, attribution.self_influence(fitted.support)[None, :])[0]
