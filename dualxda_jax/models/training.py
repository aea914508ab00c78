"""Training in optax: a pure init/step pair, and a driver that shuffles, saves and resumes."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dualxda_jax import _check, checkpoint
from dualxda_jax.data import to_float
from dualxda_jax.types import Array, Params, Progress

Apply = Callable[[Params, Array], Array]
"""(variables, x[b, ...]) -> logits [b, k]."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; hashable.

    Attributes:
        steps: optimizer steps in all; the learning rate reaches zero at the last.
        batch_size: samples of a step.
        optimizer: "adam" (AdamW) or "sgd" (Nesterov momentum).
        learning_rate: at the end of the warm-up, from where it falls along a cosine.
        momentum: of "sgd".
        weight_decay: decoupled for "adam", added to the gradient for "sgd"; kernels only.
        warmup: share of the steps in which the learning rate rises linearly.
    """

    steps: int = 3000
    batch_size: int = 128
    optimizer: str = "adam"
    learning_rate: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.05

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "sgd"):
            _check.fail("optimizer", repr(self.optimizer), '"adam" or "sgd"')
        for name in ("steps", "batch_size"):
            _check.positive_integer(name, getattr(self, name))
        if not (_check.is_real(self.learning_rate) and self.learning_rate > 0):
            _check.fail("learning_rate", repr(self.learning_rate), "more than 0 and finite")
        _check.within("momentum", self.momentum, 0.0, 1.0, "in 0..1")
        _check.within("weight_decay", self.weight_decay, 0.0, float(np.finfo(np.float32).max), "0 or more and finite")
        _check.within("warmup", self.warmup, 0.0, 1.0, "in 0..1, a share of the steps")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step needs.

    Attributes:
        variables: what `module.init` returned, "params" and perhaps "batch_stats".
        opt_state: the optimizer's state.
        step: scalar integer, steps done.
        module: static, the network.
        config: static, how it is trained.
    """

    variables: Params
    opt_state: Any
    step: Array
    module: nn.Module = dataclasses.field(metadata={"static": True})
    config: TrainConfig = dataclasses.field(metadata={"static": True})


def config_for(samples: int, *, epochs: int | None = None, **overrides: Any) -> TrainConfig:
    """The default configuration for a data set's size.

    Args:
        samples: n.
        epochs: passes over the data; by default as many as take about 330 steps, at least 6 and at most 30.
        **overrides: any field of `TrainConfig` but `steps`.
    """
    if samples < 1:
        _check.fail("samples", samples, "at least 1")
    a_pass = -(-samples // overrides.get("batch_size", TrainConfig.batch_size))
    epochs = min(30, max(6, round(330 / a_pass))) if epochs is None else epochs
    return TrainConfig(steps=epochs * a_pass, **overrides)


def init(key: Array, module: nn.Module, example: Any, config: TrainConfig) -> TrainState:
    """Fresh parameters and optimizer state.

    Args:
        key: typed key.
        module: a linen module with one array as input; BatchNorm by a `train` argument of its call.
        example: [b, ...] inputs, floats or uint8 images; only their shape and dtype count.
        config: how to train.
    """
    _check.key("key", key)
    example = jnp.zeros(np.shape(example), example.dtype)
    variables = _init_variables(module, key, to_float(example))
    opt_state = jax.jit(_optimizer(config).init)(variables["params"])
    return TrainState(variables, opt_state, jnp.zeros((), jnp.int32), module, config)


def check_labels(module: nn.Module, example: Any, labels: Any) -> None:
    """Refuse labels that are no class of a network: its loss would be that of another class, or nan.

    Args:
        module: as for `init`.
        example: as for `init`.
        labels: [n] integers.

    Raises:
        ValueError: labels outside 0..k-1, for a module whose output is [b, k].
    """

    def logits(key: Array, x: Array) -> Any:
        return module.apply(module.init(key, to_float(x)), to_float(x))

    found: Any = jax.eval_shape(logits, jax.random.key(0), jnp.asarray(example))
    _check.class_range("labels", labels, found.shape[-1])


@functools.partial(jax.jit, static_argnums=0)
def _init_variables(module: nn.Module, key: Array, example: Array) -> Any:
    return module.init(key, example)


def step(state: TrainState, batch: Any, *, apply: Apply | None = None) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on the mean cross-entropy; pure, to be jitted by the caller.

    Args:
        state: from `init` or an earlier step.
        batch: (inputs[b, ...], labels[b]) or (inputs, labels, mask[b]) or an object with those fields; rows whose mask
            is False count for nothing in the loss (BatchNorm's statistics do see them).
        apply: (variables, x[b, ...]) -> logits [b, k] that takes the module's place where it gives the same numbers
            faster; for modules whose variables are "params" alone.

    Returns:
        The next state, and {"loss", "accuracy"}, scalars.
    """
    inputs, labels, mask = _unpack(batch)
    x = to_float(jnp.asarray(inputs))
    weight = jnp.ones(labels.shape, jnp.float32) if mask is None else jnp.asarray(mask, jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    params = state.variables["params"]
    statistics = {name: value for name, value in state.variables.items() if name != "params"}

    def loss(params: Params) -> tuple[Array, tuple[Array, Any]]:
        variables = {"params": params, **statistics}
        if apply is None:
            kwargs: dict[str, Any] = {"mutable": list(statistics), **_train_mode(state.module)}
            logits, updated = state.module.apply(variables, x, **kwargs)
        else:
            logits, updated = apply(variables, x), {}
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (losses * weight).sum() / total, (logits, updated)

    (value, (logits, updated)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises its decay rates to the integer step count
        updates, opt_state = _optimizer(state.config).update(gradient, state.opt_state, params)
    variables = {**state.variables, **updated, "params": optax.apply_updates(params, updates)}
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    metrics = {"loss": value, "accuracy": (right * weight).sum() / total}
    return dataclasses.replace(state, variables=variables, opt_state=opt_state, step=state.step + 1), metrics


# The driver owns its states, so that the buffers of the last one may be reused.
_donating_step = jax.jit(step, donate_argnums=0)


def fit(
    key: Array,
    module: nn.Module,
    images: Any,
    labels: Any,
    *,
    config: TrainConfig | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> TrainState:
    """Train from scratch, or from the last epoch that `checkpoint_dir` holds.

    The same key gives the same result, interrupted or not. A pass whose last batch is short fills it with the first
    samples of the same shuffle, so that all steps have one shape.

    Args:
        key: typed key of the initial parameters and of the shuffles.
        module: a linen module; see `init`.
        images: [n, ...] uint8 images or floats.
        labels: [n] integers.
        config: how to train; None takes `config_for(n)`.
        checkpoint_dir: where to save after each pass over the data and to resume from, unless half-written or damaged.
        progress: called with (steps done, steps in all).

    Returns:
        TrainState; `variables` are the parameters that the adapters take.

    Raises:
        ValueError: lengths that differ, no samples, labels that are not integers or outside 0..k-1.
        StaleCheckpoint: `checkpoint_dir` holds a training of something else.
        FloatingPointError: the loss is not finite at the end of a pass; with the first image that holds NaN or Inf, if
            one does.
    """
    _check.key("key", key)
    images, labels = np.asarray(images), np.asarray(labels)
    _check.integers("labels", labels)
    _check.shape("labels", labels, [len(images)])
    if not len(images):
        _check.fail("images", "no samples", "at least one")
    check_labels(module, images[:1], labels)
    config = config_for(len(images)) if config is None else config
    labels = labels.astype(np.int32)
    init_key, shuffle_key = jax.random.split(key)
    state = init(init_key, module, images[:1], config)
    path = None if checkpoint_dir is None else Path(checkpoint_dir) / "latest"
    made_by = None
    if path is not None:
        made_by = checkpoint.fingerprint(key, repr(module), config, images, labels)
        state = _resume(path, state, made_by)
    a_pass = -(-len(images) // config.batch_size)
    done = int(state.step)
    while done < config.steps:
        order = _shuffle(jax.random.fold_in(shuffle_key, done // a_pass), len(images), a_pass * config.batch_size)
        for rows in order.reshape(a_pass, -1)[: config.steps - done]:
            state, metrics = _donating_step(state, (images[rows], labels[rows]))
            done += 1
            if progress is not None:
                progress(done, config.steps)
        if not np.isfinite(float(metrics["loss"])):
            bad = _check.rows_not_finite(images)
            why = f"{bad.size} images hold NaN or Inf, first {bad[0]}" if bad.size else "lower learning_rate"
            raise FloatingPointError(f"the loss is {float(metrics['loss'])} after {done} steps: {why}")
        if path is not None:
            checkpoint.save(path, _arrays(state), fingerprint=made_by, overwrite=True)
    return state


def predict(
    logits_fn: Callable[[Params, Array], Array], params: Params, images: Any, *, batch_size: int = 512
) -> np.ndarray:
    """Logits of many images, batch by batch in one compiled shape.

    Args:
        logits_fn: (params, x[b, ...]) -> [b, k], as `FeatureModel.logits`; compiled once per function.
        params: its parameters.
        images: [n, ...] uint8 images, which become [0, 1], or floats.
        batch_size: rows that the device sees at once.

    Returns:
        [n, k] on the host.
    """
    images = np.asarray(images)
    _check.positive_integer("batch_size", batch_size)
    if not len(images):
        _check.fail("images", "no samples", "at least one")
    parts = []
    for start in range(0, len(images), batch_size):
        rows = images[start : start + batch_size]
        padding = [(0, batch_size - len(rows))] + [(0, 0)] * (images.ndim - 1)
        parts.append(np.asarray(_logits(logits_fn, params, np.pad(rows, padding)))[: len(rows)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=0)
def _logits(logits_fn: Callable[[Params, Array], Array], params: Params, x: Array) -> Array:
    return logits_fn(params, to_float(x))


def accuracy(logits: Any, labels: Any) -> float:
    """Share of rows [n, k] whose largest logit is the label [n]."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    _check.shape("labels", labels, [len(logits)])
    return float((logits.argmax(-1) == labels).mean())


def schedule(config: TrainConfig) -> Callable[[Any], Any]:
    """Step -> learning rate: a linear rise, then a cosine down to zero at the last step."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, int(config.warmup * config.steps), config.steps
    )


@functools.lru_cache(maxsize=16)
def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    rate = schedule(config)

    def kernels(params: Params) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    if config.optimizer == "adam":
        return optax.adamw(rate, weight_decay=config.weight_decay, mask=kernels)
    decay = optax.add_decayed_weights(config.weight_decay, mask=kernels)
    return optax.chain(decay, optax.sgd(rate, config.momentum, nesterov=True))


def _train_mode(module: nn.Module) -> dict[str, bool]:
    return {"train": True} if "train" in inspect.signature(type(module).__call__).parameters else {}


def _unpack(batch: Any) -> tuple[Any, Any, Any]:
    if hasattr(batch, "inputs"):
        return batch.inputs, batch.labels, getattr(batch, "mask", None)
    inputs, labels, *mask = batch
    return inputs, labels, mask[0] if mask else None


def _shuffle(key: Array, samples: int, length: int) -> np.ndarray:
    return np.resize(np.asarray(jax.random.permutation(key, samples)), length)


def rows(key: Array, members: np.ndarray, config: TrainConfig) -> np.ndarray:
    """The samples of every step, as `fit` would show those of a training set.

    Args:
        key: typed key of the shuffles, the second half of what `fit` is given.
        members: [n] places of the samples in whatever holds them.
        config: how many steps of how many samples.

    Returns:
        [steps, b] places.
    """
    a_pass = -(-members.size // config.batch_size)
    orders = np.asarray(_orders(key, -(-config.steps // a_pass), members.size))
    padded = np.resize(np.arange(members.size), a_pass * config.batch_size)
    return members[orders[:, padded].reshape(-1, config.batch_size)[: config.steps]].astype(np.int32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _orders(key: Array, passes: int, samples: int) -> Array:
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(passes))
    return jax.vmap(lambda key: jax.random.permutation(key, samples))(keys)


def _arrays(state: TrainState) -> dict[str, Any]:
    return {"variables": state.variables, "opt_state": state.opt_state, "step": state.step}


def _resume(path: Path, state: TrainState, made_by: str) -> TrainState:
    try:
        return dataclasses.replace(state, **checkpoint.load(path, _arrays(state), fingerprint=made_by))
    except checkpoint.StaleCheckpoint:
        raise
    except checkpoint.CheckpointError:
        return state  # nothing there, the first write, which an interruption cut off, or damage
