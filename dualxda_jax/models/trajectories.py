"""Training that keeps parameters on the way, a whole pass in one call: for methods that use several checkpoints."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualxda_jax import _check
from dualxda_jax.models import training
from dualxda_jax.types import Array, Params, Progress

_SEGMENTS = 20


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Parameters on the way of a training.

    Attributes:
        checkpoints: t pytrees of variables, the last from the end of the training.
        learning_rates: [t] mean learning rate of the steps that lead to each from the one before.
    """

    checkpoints: tuple[Params, ...]
    learning_rates: np.ndarray


def trajectory(
    key: Array,
    module: Any,
    images: Any,
    labels: Any,
    *,
    config: training.TrainConfig,
    checkpoints: int = 1,
    apply: training.Apply | None = None,
    progress: Progress | None = None,
) -> Trajectory:
    """Train as `training.fit` does with the same key, and keep parameters at equal distances.

    Args:
        key: typed key.
        module: a linen module.
        images: [n, ...] uint8 images or floats; all are put on the device.
        labels: [n] integers.
        config: how to train.
        checkpoints: t, how many to keep, at most `config.steps`.
        apply: as in `training.step`.
        progress: called with (steps done, steps in all).

    Returns:
        The trajectory.

    Raises:
        ValueError: lengths that differ, no samples, labels that are no integers or outside 0..k-1, `checkpoints` out of
            range.
        FloatingPointError: the loss is not finite.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    _check.integers("labels", labels)
    _check.shape("labels", labels, [len(images)])
    if not len(images):
        _check.fail("images", "no samples", "at least one")
    training.check_labels(module, images[:1], labels)
    if not 1 <= checkpoints <= config.steps:
        _check.fail("checkpoints", checkpoints, f"in 1..{config.steps}, the steps")
    init_key, shuffle_key = jax.random.split(key)
    rows = jnp.asarray(training.rows(shuffle_key, np.arange(len(images)), config))
    state = training.init(init_key, module, images[:1], config)
    data = jnp.asarray(images), jnp.asarray(labels).astype(jnp.int32)
    stops = [round(config.steps * (i + 1) / checkpoints) for i in range(checkpoints)]
    size = max(1, -(-config.steps // _SEGMENTS))
    kept, done = [], 0
    for stop in stops:
        while done < stop:
            until = min(done + size, stop)
            state, loss = _segment(apply, state, data, rows[done:until])
            done = until
            if progress is not None:
                progress(done, config.steps)
        if not np.isfinite(float(loss)):
            bad = _check.rows_not_finite(images)
            why = f"{bad.size} images hold NaN or Inf, first {bad[0]}" if bad.size else "lower learning_rate"
            raise FloatingPointError(f"the loss is {float(loss)} after {done} steps: {why}")
        kept.append(state.variables)
    return Trajectory(tuple(kept), _rates(config, stops))


def _rates(config: training.TrainConfig, stops: list[int]) -> np.ndarray:
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its floats with the integer step count
        rates = np.asarray(jax.vmap(training.schedule(config))(jnp.arange(config.steps)))
    return np.asarray([part.mean() for part in np.split(rates, stops[:-1])], np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _segment(
    apply: training.Apply | None, state: training.TrainState, data: tuple[Array, Array], rows: Array
) -> tuple[training.TrainState, Array]:
    images, labels = data

    def body(state: training.TrainState, rows: Array) -> tuple[training.TrainState, Array]:
        state, metrics = training.step(state, (images[rows], labels[rows]), apply=apply)
        return state, metrics["loss"]

    state, losses = lax.scan(body, state, rows)
    return state, losses[-1]
