"""Changes to DualDA that might raise its quality, one option each, to be measured against the method as it is.

Averaging over checkpoints gained on five of seven metrics on MNIST and on Fashion-MNIST, the others on fewer: the
tables are in benchmarks/README.md, and `dualxda evaluate --methods dualda_variant` makes them.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check, attribution, svm
from dualxda_jax.baselines.gradients import check_finite, map_forward
from dualxda_jax.baselines.protocol import Context, Method, check_queries
from dualxda_jax.baselines.settings import count_checkpoints, take_checkpoint
from dualxda_jax.types import Array, DualSolution, Params, SupportModel

LABELS = ("given", "predicted")
OVER = ("mean", "best")


@dataclasses.dataclass(frozen=True)
class Config:
    """Static options of `dualda_variant`; see there."""

    costs: tuple[float, ...]
    over: str
    normalize: bool
    centre: bool
    intercept: float
    labels: str
    checkpoints: int
    solver: svm.SolverConfig
    chunk: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """One surrogate.

    Attributes:
        params: of the network whose features it is fitted on.
        centre: [d] subtracted from features.
        length: scalar, norm of normalised features.
        support: its support vectors.
        weight: scalar, what its scores are multiplied by.
    """

    params: Params
    centre: Array
    length: Array
    support: SupportModel
    weight: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """The surrogates, whose weighted scores are added.

    Attributes:
        context: what was learnt from.
        parts: one or several.
    """

    context: Context
    parts: tuple[Part, ...]


def dualda_variant(
    *,
    cost: float | tuple[float, ...] = 1e-3,
    over: str = "mean",
    normalize: bool = False,
    centre: bool = False,
    intercept: float = 0.0,
    labels: str = "given",
    checkpoints: int = 1,
    config: svm.SolverConfig | None = None,
    chunk: int = 256,
) -> Method:
    """DualDA with changed features, labels, costs or checkpoints; without any change it is `dualda`.

    Several surrogates (costs, checkpoints) are averaged after each one's scores were divided by the Frobenius norm of
    its weights, because a surrogate's logits grow with its cost.

    Args:
        cost: C of the SVM, or several.
        over: of several costs, "mean" averages over them, and "best" takes the one whose surrogate's logits correlate
            most with the network's, over the training samples (Pearson's, all classes together).
        normalize: features of one norm, the root mean square of all training features' norms, so that a cost means the
            same as without.
        centre: subtract the mean of the training features, before normalising.
        intercept: the constant feature that the SVM sees beside the others; 0 is none.
        labels: "given", or "predicted": the network's own predictions take the labels' place.
        checkpoints: how many of the context's last checkpoints are averaged over.
        config: of the solver; by default `svm.SolverConfig()`.
        chunk: samples that the network sees at once.

    Raises:
        ValueError: a bad argument; in `fit`, a context without features or with fewer checkpoints, a cost that
            `svm.solve` refuses.
    """
    costs = tuple(cost) if isinstance(cost, tuple | list) else (cost,)
    for name, value, known in (("over", over, OVER), ("labels", labels, LABELS)):
        if value not in known:
            _check.fail(name, repr(value), f"one of {', '.join(known)}")
    _check.positive_integer("checkpoints", checkpoints)
    _check.positive_integer("chunk", chunk)
    if not costs:
        _check.fail("cost", "none", "one or more")
    if not (_check.is_real(intercept) and intercept >= 0):
        _check.fail("intercept", intercept, "finite and 0 or more")
    solver = dataclasses.replace(svm.SolverConfig() if config is None else config, intercept_scaling=float(intercept))
    settings = Config(costs, over, normalize, centre, float(intercept), labels, checkpoints, solver, chunk)
    return Method(
        "dualda_variant", functools.partial(_fit, settings), functools.partial(_scores, settings), _self_influence
    )


def _fit(config: Config, key: Array, context: Context) -> Fitted:
    if context.features is None:
        _check.fail("context.features", None, "the function that gives the input of the final layer")
    count = count_checkpoints(config.checkpoints, context)
    parts = [p for i in range(count) for p in _parts(config, context, take_checkpoint(count, context, i))]
    if len(parts) > 1:
        weights = [1.0 / (len(parts) * max(float(jnp.linalg.norm(p.support.weights)), 1e-30)) for p in parts]
        parts = [
            dataclasses.replace(p, weight=jnp.asarray(w, p.weight.dtype)) for p, w in zip(parts, weights, strict=True)
        ]
    return Fitted(context, tuple(parts))


def _parts(config: Config, context: Context, params: Params) -> list[Part]:
    """The surrogates of one checkpoint."""
    raw = _mapped(context.features, params, context.inputs, config.chunk)
    check_finite("features", raw)
    centre = raw.mean(axis=0) if config.centre else jnp.zeros_like(raw[0])
    length = jnp.sqrt(jnp.square(raw - centre[None]).sum(axis=1).mean())
    points = _changed(config.normalize, raw, centre, length)
    asked = config.labels == "predicted" or config.over == "best"
    logits: Any = _mapped(context.logits, params, context.inputs, config.chunk) if asked else None
    labels = context.labels if config.labels == "given" else logits.argmax(axis=1).astype(context.labels.dtype)
    solve = functools.partial(svm.solve, points, labels, num_classes=context.num_classes, config=config.solver)
    if config.over == "best":
        solutions = [_best(config, solve, logits, points)]
    else:
        solutions = [solve(cost=cost) for cost in config.costs]
    one = jnp.ones((), points.dtype)
    return [Part(params, centre, length, attribution.compress(points, labels, s), one) for s in solutions]


def _best(config: Config, solve: Callable[..., DualSolution], logits: Array, points: Array) -> DualSolution:
    """The solution whose logits correlate most with the network's."""
    best, most = None, -np.inf
    network = np.asarray(logits, np.float64).ravel()
    for cost in config.costs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", svm.NotConvergedWarning)  # such a one is still a candidate
            solution = solve(cost=cost)
        ours = np.asarray(points, np.float64) @ np.asarray(solution.weights, np.float64).T
        ours = (ours + np.asarray(solution.intercept, np.float64)[None]).ravel()
        alike = float(np.corrcoef(ours, network)[0, 1]) if ours.std() > 0 and network.std() > 0 else -1.0
        if best is None or alike > most:
            best, most = solution, alike
    assert best is not None  # there is a cost
    return best


@functools.partial(jax.jit, static_argnums=(0, 3))
def _mapped(function: Any, params: Params, x: Array, chunk: int) -> Array:
    return map_forward(lambda part: function(params, part), x, chunk)


@functools.partial(jax.jit, static_argnums=0)
def _changed(normalize: bool, raw: Array, centre: Array, length: Array) -> Array:
    points = raw - centre[None]
    if not normalize:
        return points
    norms = jnp.linalg.norm(points, axis=1, keepdims=True)
    # By what is 0, not by what is above it: NaN is neither, and is to stay.
    return jnp.where(norms == 0, 0, points * (length / jnp.where(norms == 0, 1, norms)))


def _scores(config: Config, fitted: Fitted, x: Array, targets: Array) -> Array:
    targets, x = check_queries(fitted.context, x, targets), jnp.asarray(x)
    total: Any = 0.0
    for part in fitted.parts:
        raw = _mapped(fitted.context.features, part.params, x, config.chunk)
        query = _changed(config.normalize, raw, part.centre, part.length)
        total += part.weight * attribution.dense(part.support, attribution.scores(part.support, query, targets))
    return total


def _self_influence(fitted: Fitted) -> Array:
    total: Any = 0.0
    for part in fitted.parts:
        own = attribution.self_influence(part.support)
        total += part.weight * attribution.dense(part.support, own[None])[0]
    return total
