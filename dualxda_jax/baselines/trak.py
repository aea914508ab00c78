"""TRAK: after the kernel of projected gradients, the network as a linear model of them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax import _check
from dualxda_jax.baselines import gradients, rows, select
from dualxda_jax.baselines.projections import Projection
from dualxda_jax.baselines.protocol import Context, Method, Stages, check_queries, margin, staged
from dualxda_jax.baselines.settings import (
    Config,
    chunk_size,
    count_checkpoints,
    dtype_name,
    gradient_features,
    parameters,
    take_checkpoint,
)
from dualxda_jax.types import Array

DEFAULT_SIZE = 2048


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """Kernelised features.

    Attributes:
        context: what was learnt from.
        key: typed key of the projections.
        solved: for each checkpoint Φ (ΦᵀΦ + λI)⁻¹, [n, P].
        leverage: [n] mean over checkpoints of φ_iᵀ (ΦᵀΦ + λI)⁻¹ φ_i.
        weights: [n] mean over checkpoints of 1 − p_i, p_i the probability of the label.
    """

    context: Context
    key: Array
    solved: tuple[Array, ...]
    leverage: Array
    weights: Array


def trak(
    *,
    projection: int | None = None,
    projection_kind: str = "sjlt",
    regularization: float = 0.0,
    params: select.Filter = "all",
    checkpoints: int | None = None,
    dtype: Any = None,
    chunk: int | None = None,
) -> Method:
    """Score mean_k [φ(x)ᵀ (ΦᵀΦ + λI)⁻¹ φ_i] · mean_k [1 − p_i], means over t checkpoints.

    φ is the projected gradient of the margin log(p / (1 − p)), at the label for training samples and at the target for
    queries; p_i is the probability of the label. Both means are over all checkpoints of the context. Self-influence is
    mean_k [φ_iᵀ (ΦᵀΦ + λI)⁻¹ φ_i] · mean_k [1 − p_i]. The kernel is inverted in float64; directions in which no
    training sample has a gradient (fewer samples than dimensions, constant features) are left out (pseudo-inverse), so
    that the scores are finite for any kernel.

    The reference code divides each checkpoint's inverse by its mean absolute entry; here, as in the paper, it does not.

    Args:
        projection: P; None takes 2,048 or n/2, whichever is less (with as many dimensions as samples the kernel is
            nearly singular and scores are noise), and no projection where there are no more parameters than that.
        projection_kind: "sjlt", "rademacher" or "gaussian"; see `projections`.
        regularization: λ.
        params: which parameters take part: "all", "head", a shell pattern on paths, or a tuple of these.
        checkpoints: take only so many, the last ones; None for all.
        dtype: what gradients are computed to before the projection, as "bfloat16".
        chunk: samples whose gradients are taken at once; by default as many as take 128 MiB, at most 256.

    Raises:
        ValueError: a bad projection or regularization; in `fit`, a filter that matches nothing, a projection larger
            than the number of parameters, fewer checkpoints, NaN or Inf in a gradient (naming the samples).

    Source: Park et al. 2023, "TRAK: Attributing model behavior at scale".
    """
    if not (_check.is_real(regularization) and regularization >= 0):
        _check.fail("regularization", regularization, "finite and 0 or more")
    regularization = float(regularization)
    default = Projection(DEFAULT_SIZE, projection_kind)
    fixed = None if projection is None else Projection(projection, projection_kind)
    config = Config(params, fixed, checkpoints, dtype=dtype_name(dtype), chunk=chunk)
    settings = (config, default, regularization)
    stages = Stages(
        settings,
        functools.partial(count_checkpoints, checkpoints),
        functools.partial(_part, *settings),
        _join,
    )
    return staged("trak", stages, functools.partial(_scores, config, default), _self_influence)


def _resolved(config: Config, default: Projection, context: Context, params: Any) -> Config:
    """The configuration with the projection that these parameters get."""
    if config.projection is not None:
        return config
    count = parameters(select.select(params, config.params, head=context.head), params)
    size = max(1, min(default.size, context.labels.shape[0] // 2))
    return dataclasses.replace(config, projection=dataclasses.replace(default, size=size)) if count > size else config


def _features(config: Config, context: Context, params: Any, key: Array, x: Array, labels: Array) -> Array:
    found = gradient_features(config, margin, context, params, key, x, labels)
    return rows.flat(found).astype(rows.accumulator(found))


def _part(
    config: Config, default: Projection, regularization: float, key: Array, context: Context, earlier: tuple[Any, ...]
) -> dict[str, Array]:
    number = len(earlier)
    params = take_checkpoint(config.checkpoints, context, number)
    config = _resolved(config, default, context, params)
    features, weights = _compute_features(config, context, params, jax.random.fold_in(key, number))
    gradients.check_finite("gradients", jnp.abs(features).max(axis=1))
    with jax.enable_x64(True):
        solved, leverage = _solve(features, regularization)
    return {"solved": solved, "leverage": leverage, "weights": weights}


@functools.partial(jax.jit, static_argnums=0)
def _compute_features(config: Config, context: Context, params: Any, key: Array) -> tuple[Array, Array]:
    chunk = chunk_size(config, margin, context, params)

    def both(x: Array, labels: Array) -> tuple[Array, Array]:
        found = _features(config, context, params, key, x, labels)
        # 1 − p, without the loss of digits where p is nearly 1.
        doubts = jax.nn.sigmoid(-jax.vmap(margin)(context.logits(params, x), labels))
        return found, doubts.astype(found.dtype)

    return gradients.map_training(both, context, chunk)


@functools.partial(jax.jit, static_argnums=1)
def _solve(features: Array, regularization: float) -> tuple[Array, Array]:
    """Φ (ΦᵀΦ + λI)⁺ and the diagonal of Φ (ΦᵀΦ + λI)⁺ Φᵀ."""
    wide = features.astype(jnp.float64)
    few = wide.shape[0] < wide.shape[1]
    # With fewer samples than dimensions by (ΦΦᵀ + λI)⁺ Φ, which is the same and smaller.
    values, vectors = jnp.linalg.eigh(wide @ wide.T if few else wide.T @ wide)
    # Rounding of the features leaves singular values of this size in directions that none of them has.
    noise = float(jnp.finfo(features.dtype).eps) * math.sqrt(max(features.shape))
    kept = values > noise**2 * jnp.maximum(values[-1], 0)
    inverse = jnp.where(kept, 1 / jnp.where(kept, values + regularization, 1), 0)
    if few:
        solved = (vectors * inverse[None, :]) @ (vectors.T @ wide)
        leverage = jnp.square(vectors) @ (inverse * values)
    else:
        turned = wide @ vectors
        solved = (turned * inverse[None, :]) @ vectors.T
        leverage = jnp.square(turned) @ inverse
    return solved.astype(features.dtype), leverage.astype(features.dtype)


def _join(key: Array, context: Context, parts: tuple[dict[str, Array], ...]) -> Fitted:
    leverage, weights = (jnp.stack([part[name] for part in parts]).mean(0) for name in ("leverage", "weights"))
    return Fitted(context, key, tuple(part["solved"] for part in parts), leverage, weights)


def _scores(config: Config, default: Projection, fitted: Fitted, x: Array, targets: Array) -> Array:
    targets = check_queries(fitted.context, x, targets)
    context = fitted.context
    config = _resolved(config, default, context, context.params)
    total: Any = 0
    for number, solved in enumerate(fitted.solved):
        params = take_checkpoint(config.checkpoints, context, number)
        # One compiled function for all checkpoints.
        total += _outputs(
            config, context, params, jax.random.fold_in(fitted.key, number), solved, jnp.asarray(x), targets
        )
    total = total / len(fitted.solved) * fitted.weights[None, :]
    gradients.check_finite("scores", total)
    return total


@functools.partial(jax.jit, static_argnums=0)
def _outputs(
    config: Config, context: Context, params: Any, key: Array, solved: Array, x: Array, targets: Array
) -> Array:
    """[q, n] φ(x)ᵀ (ΦᵀΦ + λI)⁻¹ φ_i at one checkpoint."""
    chunk = chunk_size(config, margin, context, params)
    one = functools.partial(_features, config, context, params, key)
    return rows.products(gradients.map_chunks(one, (x, targets), chunk), solved, solved.dtype)


def _self_influence(fitted: Fitted) -> Array:
    return fitted.leverage * fitted.weights
