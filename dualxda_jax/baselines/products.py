"""GradDot, GradCos and TracIn: inner products of the gradients of training samples and queries."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax.baselines import gradients, rows, select
from dualxda_jax.baselines.protocol import Context, Method, Stages, check_queries, staged
from dualxda_jax.baselines.settings import (
    MEMORY,
    Config,
    chunk_size,
    count_checkpoints,
    dtype_name,
    gradient_features,
    projection_of,
    take_checkpoint,
)
from dualxda_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """Gradients of the training samples.

    Attributes:
        context: what was learnt from.
        key: typed key of the projections.
        parts: for each checkpoint {"norms": ‖P g_i‖² [n], "rows": the gradients, [n, P] if projected, or None where
            they take too much memory}.
    """

    context: Context
    key: Array
    parts: tuple[dict[str, Any], ...]


def graddot(
    *,
    params: select.Filter = "all",
    projection: int | None = None,
    projection_kind: str = "sjlt",
    dtype: Any = None,
    chunk: int | None = None,
    memory: int = MEMORY,
) -> Method:
    """Score ⟨∇ℓ(z_i), ∇ℓ(x, target)⟩ at the last checkpoint: what a step on i would lower the loss at the target by.

    Both are gradients of the loss, so that the score is positive where i speaks for the target. Self-influence is
    ‖∇ℓ(z_i)‖². A sample with zero gradient scores 0.

    Args:
        params: which parameters take part: "all", "head", a shell pattern on paths, or a tuple of these.
        projection: project the gradients to so many dimensions; None for exact products.
        projection_kind: "sjlt", "rademacher" or "gaussian"; see `projections`.
        dtype: what gradients are kept in, as "bfloat16"; products accumulate in float32 or wider. By default the
            parameters' dtype.
        chunk: samples whose gradients are taken at once; by default as many as take 128 MiB, at most 256.
        memory: bytes that kept training gradients may take; beyond, `scores` computes them anew. Gradients of dense
            layers are kept as their two factors.

    Raises:
        ValueError: a bad projection, chunk or memory; in `fit`, a filter that matches nothing, a projection larger than
            the number of parameters, NaN or Inf in a gradient (naming the samples).

    Source: Charpiat et al. 2019, "Input similarity from the neural network perspective".
    """
    kind = projection_of(projection, projection_kind)
    config = Config(params, kind, 1, dtype=dtype_name(dtype), chunk=chunk, memory=memory)
    return _method("graddot", config)


def gradcos(
    *,
    params: select.Filter = "all",
    projection: int | None = None,
    projection_kind: str = "sjlt",
    dtype: Any = None,
    chunk: int | None = None,
    memory: int = MEMORY,
) -> Method:
    """Cosine of the two gradients that `graddot` multiplies; 0 where one of them is 0.

    Self-influence is ‖∇ℓ(z_i)‖², as of `graddot`: the cosine of a gradient with itself says nothing.

    Args:
        params: as in `graddot`.
        projection: as in `graddot`.
        projection_kind: as in `graddot`.
        dtype: as in `graddot`.
        chunk: as in `graddot`.
        memory: as in `graddot`.

    Raises:
        ValueError: as in `graddot`.
    """
    kind = projection_of(projection, projection_kind)
    config = Config(params, kind, 1, cosine=True, dtype=dtype_name(dtype), chunk=chunk, memory=memory)
    return _method("gradcos", config)


def tracin(
    *,
    params: select.Filter = "all",
    projection: int | None = None,
    projection_kind: str = "sjlt",
    checkpoints: int | None = None,
    dtype: Any = None,
    chunk: int | None = None,
    memory: int = MEMORY,
) -> Method:
    """Score (1/t) Σ_k lr_k ⟨P g_i, P g⟩ over t checkpoints; g_i and g are the loss gradients of i and (x, target).

    The mean over checkpoints, of all that the context holds, its `params` among them. Self-influence is
    (1/t) Σ_k lr_k ‖P g_i‖². The paper that DualDA comes from takes projection=128 and projection_kind="gaussian";
    without a projection products are exact and, for networks of dense layers, faster.

    Args:
        params: as in `graddot`.
        projection: as in `graddot`; a projection of its own for every checkpoint.
        projection_kind: as in `graddot`.
        checkpoints: take only so many, the last ones; None for all.
        dtype: as in `graddot`.
        chunk: as in `graddot`.
        memory: as in `graddot`; for each checkpoint.

    Raises:
        ValueError: as in `graddot`; and in `fit`, a context with fewer checkpoints.

    Source: Pruthi et al. 2020, "Estimating training data influence by tracing gradient descent" (TracInCP).
    """
    kind = projection_of(projection, projection_kind)
    return _method("tracin", Config(params, kind, checkpoints, False, True, dtype_name(dtype), chunk, memory))


def _method(name: str, config: Config) -> Method:
    stages = Stages(
        config,
        functools.partial(count_checkpoints, config.checkpoints),
        functools.partial(_part, config),
        lambda key, context, parts: Fitted(context, key, parts),
    )
    return staged(name, stages, functools.partial(_scores, config), functools.partial(_self_influence, config))


def _part(config: Config, key: Array, context: Context, earlier: tuple[Any, ...]) -> dict[str, Any]:
    number = len(earlier)
    params = take_checkpoint(config.checkpoints, context, number)
    part = _compute_part(config, context, params, jax.random.fold_in(key, number))
    gradients.check_finite("gradients", part["norms"])
    return part


@functools.partial(jax.jit, static_argnums=0)
def _compute_part(config: Config, context: Context, params: Any, key: Array) -> dict[str, Any]:
    chunk = chunk_size(config, context.loss, context, params)
    one = functools.partial(gradient_features, config, context.loss, context, params, key)
    shapes = jax.eval_shape(one, context.inputs[:1], context.labels[:1])
    keep = rows.nbytes(shapes) * context.labels.shape[0] <= config.memory

    def both(x: Array, labels: Array) -> dict[str, Any]:
        found = one(x, labels)
        return {"norms": rows.squared_norms(found), "rows": found if keep else None}

    return gradients.map_training(both, context, chunk)


def _scores(config: Config, fitted: Fitted, x: Array, targets: Array) -> Array:
    targets = check_queries(fitted.context, x, targets)
    total: Any = 0
    for number, part in enumerate(fitted.parts):
        params = take_checkpoint(config.checkpoints, fitted.context, number)
        key = jax.random.fold_in(fitted.key, number)
        # One compiled function for all checkpoints.
        values = _products(config, fitted.context, params, key, part, jnp.asarray(x), targets)
        total += values * _rate(config, fitted.context, number).astype(values.dtype)
    total = total / len(fitted.parts)
    gradients.check_finite("scores", total)
    return total


@functools.partial(jax.jit, static_argnums=0)
def _products(
    config: Config, context: Context, params: Any, key: Array, part: dict[str, Any], x: Array, targets: Array
) -> Array:
    one = functools.partial(gradient_features, config, context.loss, context, params, key)
    chunk = chunk_size(config, context.loss, context, params)
    query = gradients.map_chunks(one, (x, targets), chunk)
    values = _against(one, query, part["rows"], context, chunk)
    if not config.cosine:
        return values
    return values * _inverse_root(rows.squared_norms(query))[:, None] * _inverse_root(part["norms"])[None, :]


def _against(one: Any, query: Any, kept: Any, context: Context, chunk: int) -> Array:
    """[q, n] products with the kept gradients, or with gradients that are computed anew chunk by chunk."""
    if kept is not None:
        return rows.dot(query, kept)
    return gradients.map_training(lambda x, y: rows.dot(one(x, y), query), context, chunk).T


def _inverse_root(squares: Array) -> Array:
    return jnp.where(squares == 0, 0, jax.lax.rsqrt(jnp.where(squares == 0, 1, squares)))


def _rate(config: Config, context: Context, number: int) -> Array:
    """Weight of a checkpoint."""
    if not config.weighted:
        return jnp.ones((), jnp.float32)
    return context.learning_rates[len(context.checkpoints) - count_checkpoints(config.checkpoints, context) + number]


def _self_influence(config: Config, fitted: Fitted) -> Array:
    total: Any = 0
    for number, part in enumerate(fitted.parts):
        total += part["norms"] * _rate(config, fitted.context, number).astype(part["norms"].dtype)
    return total / len(fitted.parts)
