"""What every attribution method is: four fields, all of them pure.

Letters as in `types`; t is the number of checkpoints.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.baselines.placement import automatic
from dualxda_jax.baselines.rows import wide
from dualxda_jax.types import Array, FeatureFn, Params

Logits = Callable[[Params, Array], Array]
"""(params, x[b, ...]) -> logits [b, k], deterministic: BatchNorm in eval mode, no dropout."""

Loss = Callable[[Array, Array], Array]
"""(logits [k], label) -> scalar: the loss of one sample."""


def cross_entropy(logits: Array, label: Array) -> Array:
    """Negative log-softmax at the label, for logits [k] and an integer label.

    Computed as log(1 + exp(−margin)): where the label is nearly certain, the gradient of log-softmax is a difference of
    nearly equal numbers, and little of its direction is left in float32.
    """
    return jax.nn.softplus(-margin(logits, label))


def margin(logits: Array, label: Array) -> Array:
    """log(p / (1 − p)) of the label's probability p, in float32 or wider: its logit less the others' log-sum-exp."""
    logits = logits.astype(wide(logits.dtype))
    others = jnp.where(jnp.arange(logits.shape[0], dtype=jnp.result_type(label)) == label, -jnp.inf, logits)
    return logits[label] - jax.nn.logsumexp(others)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a method may learn from: a trained network and its training set. Make one with `context`.

    Attributes:
        inputs: [n, ...] training inputs as the network takes them.
        labels: [n] int32 in 0..k-1.
        checkpoints: t parameter pytrees in the order of training; the last is the network that is explained.
        learning_rates: [t] the learning rate at each checkpoint.
        logits: static, the network.
        features: static, its penultimate features, or None for methods that need none.
        head: static, path of the final linear layer in the parameters, as "head" or "decoder/head", or None.
        loss: static, the training loss of one sample.
        num_classes: static, k.
    """

    inputs: Array
    labels: Array
    checkpoints: tuple[Params, ...]
    learning_rates: Array
    logits: Logits = dataclasses.field(metadata={"static": True})
    features: FeatureFn | None = dataclasses.field(metadata={"static": True})
    head: str | None = dataclasses.field(metadata={"static": True})
    loss: Loss = dataclasses.field(metadata={"static": True})
    num_classes: int = dataclasses.field(metadata={"static": True})

    @property
    def params(self) -> Params:
        """Parameters of the network that is explained."""
        return self.checkpoints[-1]


def context(
    logits: Logits,
    params: Params,
    inputs: Any,
    labels: Any,
    *,
    num_classes: int,
    features: FeatureFn | None = None,
    head: str | None = None,
    loss: Loss = cross_entropy,
    checkpoints: tuple[Params, ...] | None = None,
    learning_rates: Any = None,
) -> Context:
    """Check and gather what methods learn from.

    Args:
        logits: (params, x[b, ...]) -> [b, k].
        params: the trained parameters, explained by every method.
        inputs: [n, ...] training inputs, floating point or integer tokens.
        labels: [n] integers in 0..k-1.
        num_classes: k.
        features: (params, x[b, ...]) -> [b, d], the input of the final linear layer.
        head: path of that layer, as `models.from_linen` gives it.
        loss: (logits [k], label) -> scalar.
        checkpoints: earlier parameters in the order of training, for methods that use several; `params` comes
            after them, unless it is the last one itself.
        learning_rates: [t] one for each checkpoint, `params` included; by default 1.

    Raises:
        ValueError: shapes that do not fit, labels outside 0..k-1, a network with other than k logits, no samples,
            checkpoints that are no tuple of parameters like `params`.
    """
    for name, function in {"logits": logits, "loss": loss}.items():
        if not callable(function):
            _check.fail(name, f"a {type(function).__name__}", "a function")
    if features is not None and not callable(features):
        _check.fail("features", f"a {type(features).__name__}", "a function (params, x) -> [b, d], or None")
    if len(np.shape(inputs)) < 2 or np.shape(inputs)[0] == 0:
        _check.fail("inputs", f"shape {np.shape(inputs)}", "[n, ...] with n of 1 or more")
    _check.numbers("inputs", inputs, or_bool=True)
    _check.shape("labels", labels, (np.shape(inputs)[0],))
    _check.integers("labels", labels)
    if not _check.is_whole(num_classes) or num_classes < 2:
        _check.fail("num_classes", num_classes, "an integer, 2 or more")
    _check.class_range("labels", labels, num_classes)
    inputs = jnp.asarray(inputs)
    _check_width(logits, params, inputs, num_classes)
    every = _alike(checkpoints, params)
    if not every or every[-1] is not params:
        every = (*every, params)
    rates = jnp.ones(len(every), jnp.float32) if learning_rates is None else jnp.asarray(learning_rates, jnp.float32)
    _check.shape("learning_rates", rates, (len(every),))
    if not _check.is_traced(rates) and not np.isfinite(rates).all():
        _check.fail("learning_rates", np.asarray(rates).tolist(), "finite")
    labels = jnp.asarray(labels).astype(jnp.int32)
    return Context(inputs, labels, every, rates, logits, features, head, loss, num_classes)


def _alike(checkpoints: Any, params: Params) -> tuple[Params, ...]:
    """The checkpoints, each like the parameters; a tree of parameters alone would be taken for many of them."""
    if checkpoints is None:
        return ()
    if not isinstance(checkpoints, tuple | list):
        _check.fail("checkpoints", f"a {type(checkpoints).__name__}", "a tuple of parameters")
    shapes = lambda tree: (jax.tree.structure(tree), [np.shape(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    for number, one in enumerate(checkpoints):
        if shapes(one) != shapes(params):
            _check.fail("checkpoints", f"other leaves or shapes than those of params at {number}", "alike")
    return tuple(checkpoints)


def _check_width(logits: Logits, params: Params, inputs: Any, num_classes: int) -> None:
    """Refuse a network with other than k logits: the score of a class that it lacks would be that of another."""
    # Without where they lie: over Explicit axes methods go by arrays over Auto ones.
    known = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if hasattr(a, "dtype") else a  # noqa: E731
    one = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)
    found = jax.eval_shape(logits, jax.tree.map(known, params), one).shape
    if found != (1, num_classes):
        _check.fail("num_classes", num_classes, f"that of the network, whose logits of one sample are {list(found)}")


@dataclasses.dataclass(frozen=True)
class Stages:
    """A fit that takes long, cut into parts that can be kept: what `fit_resumable` needs.

    `fit(key, context)` equals `join(key, context, parts)` with each part made from those before it.

    Attributes:
        settings: the hyper-parameters, anything that `checkpoint.fingerprint` can read.
        count: (context) -> how many parts.
        part: (key, context, earlier parts) -> the next part: arrays in dicts, lists, tuples and `rows.Outer`.
        join: (key, context, all parts) -> what `fit` returns.
    """

    settings: Any
    count: Callable[[Context], int]
    part: Callable[[Array, Context, tuple[Any, ...]], Any]
    join: Callable[[Array, Context, tuple[Any, ...]], Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """An attribution method; what `baselines.<name>(...)` returns.

    In all of them a higher score means that the sample speaks for the target. Training inputs and labels may be sharded
    over a mesh, with Auto or Explicit axes; what comes of them lies over Auto axes, and chunks of them are rounded up
    to a multiple of the devices.

    Attributes:
        name: short, unique among the methods, as "trak".
        fit: (key, context) -> a pytree, all that scores need.
        scores: (fitted, x[q, ...], targets[q]) -> [q, n].
        self_influence: (fitted) -> [n]; higher is more suspicious.
        stages: how to resume a fit that takes long, or None.
    """

    name: str
    fit: Callable[[Array, Context], Any]
    scores: Callable[[Any, Array, Array], Array]
    self_influence: Callable[[Any], Array]
    stages: Stages | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fit", _with_key(self.fit))
        object.__setattr__(self, "scores", _of_any(self.scores))
        for name in ("fit", "scores", "self_influence"):
            object.__setattr__(self, name, automatic(getattr(self, name)))


def _with_key(fit: Callable[[Array, Context], Any]) -> Callable[[Array, Context], Any]:
    @functools.wraps(fit)
    def checked(key: Array, context: Context) -> Any:
        _check.key("key", key)
        return fit(key, context)

    return checked


def _of_any(scores: Callable[[Any, Array, Array], Array]) -> Callable[[Any, Array, Array], Array]:
    """The scores of no queries, too: [0, n]."""

    @functools.wraps(scores)
    def run(fitted: Any, x: Array, targets: Array) -> Array:
        if np.shape(x)[:1] != (0,):
            return scores(fitted, x, targets)
        _check.shape("targets", targets, (0,))
        one = lambda a: jax.ShapeDtypeStruct((1, *np.shape(a)[1:]), jnp.result_type(a))  # noqa: E731
        found = jax.eval_shape(scores, fitted, one(x), one(targets))
        return jnp.zeros((0, *found.shape[1:]), found.dtype)

    return run


def staged(name: str, stages: Stages, scores: Any, self_influence: Any) -> Method:
    """A method whose fit is its stages, one after the other."""

    def fit(key: Array, context: Context) -> Any:
        parts: tuple[Any, ...] = ()
        for _ in range(stages.count(context)):
            parts = (*parts, stages.part(key, context, parts))
        return stages.join(key, context, parts)

    return Method(name, fit, scores, self_influence, stages)


def check_queries(context: Context, x: Any, targets: Any) -> Array:
    """The targets as int32, after a look at whether queries and targets can be.

    Raises:
        ValueError: queries of another shape than the training inputs, targets that are no integers in 0..k-1.
    """
    _check.shape("x", x, ("q", *np.shape(context.inputs)[1:]))
    _check.numbers("x", x, or_bool=True)
    _check.shape("targets", targets, (np.shape(x)[0],))
    _check.integers("targets", targets)
    _check.class_range("targets", targets, context.num_classes)
    return jnp.asarray(targets).astype(jnp.int32)
