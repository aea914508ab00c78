"""Methods on the final layer alone, computed on features that are extracted once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax import _check
from dualxda_jax.baselines.protocol import Context, Method, check_queries, context
from dualxda_jax.baselines.rows import wide
from dualxda_jax.baselines.select import select
from dualxda_jax.baselines.similarity import features
from dualxda_jax.types import Array, Params

HEAD = "head"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` gives.

    Attributes:
        context: the network and its training set.
        inner: what the method's own fit made of the features and the head.
    """

    context: Context
    inner: Any


def on_features(method: Method, *, chunk: int = 256) -> Method:
    """The same method, shown the penultimate features as inputs and the final layer as network.

    For a method that takes only the final layer's parameters as free (`params="head"`), scores are the same up to
    rounding, without passing the training set through the network for each product with the Hessian.

    Args:
        method: with `params="head"`, or one that must then mean all of the final layer.
        chunk: samples that the network sees at once.

    Returns:
        A method of the same name, without stages.

    Raises:
        ValueError: a chunk below 1; in `fit`, a context without features or head, or a head that is no kernel with or
            without bias.
    """
    _check.positive_integer("chunk", chunk)

    def fit(key: Array, context: Context) -> Fitted:
        return Fitted(context, method.fit(key, head_context(context, chunk=chunk)))

    def scores(fitted: Fitted, x: Array, targets: Array) -> Array:
        targets = check_queries(fitted.context, x, targets)
        return method.scores(fitted.inner, features(fitted.context, jnp.asarray(x), chunk), targets)

    def self_influence(fitted: Fitted) -> Array:
        return method.self_influence(fitted.inner)

    return Method(method.name, fit, scores, self_influence)


def head_context(whole: Context, *, chunk: int = 256) -> Context:
    """The final layer as a network of its own, with the features of the explained network as inputs.

    Args:
        whole: with features and head.
        chunk: samples that the network sees at once.

    Raises:
        ValueError: a chunk below 1, no features, no head, or one that is no kernel with or without bias.
    """
    _check.positive_integer("chunk", chunk)
    if whole.head is None:
        _check.fail("context.head", None, "the path of the final layer")
    chosen, _ = select(whole.params, "head", head=whole.head).split(whole.params)
    head = {name.rsplit("/", 1)[-1]: leaf.astype(wide(leaf.dtype)) for name, leaf in chosen.items()}
    if not {"kernel"} <= set(head) <= {"kernel", "bias"} or len(head) != len(chosen) or head["kernel"].ndim != 2:
        _check.fail("context.head", f"a layer of {', '.join(sorted(chosen))}", "a kernel [d, k], perhaps with a bias")
    return context(
        _logits, {HEAD: head}, features(whole, whole.inputs, chunk), whole.labels, num_classes=whole.num_classes,
        features=_identity, head=HEAD, loss=whole.loss,
    )  # fmt: skip


def _logits(params: Params, x: Array) -> Array:
    head = params[HEAD]
    found = jnp.matmul(x, head["kernel"], precision=jax.lax.Precision.HIGHEST)
    return found + head["bias"][None] if "bias" in head else found


def _identity(params: Params, x: Array) -> Array:
    del params
    return x
