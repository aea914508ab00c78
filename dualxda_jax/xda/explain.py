"""From a score to heat maps: relevance of one input, of a pair, of the surrogate's logit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualxda_jax import _check
from dualxda_jax.types import Array, FeatureFn, PairRelevance, Params, SupportModel
from dualxda_jax.xda import plan, reach, tokens, transform, walk
from dualxda_jax.xda.composites import Composite

_HIGHEST = jax.lax.Precision.HIGHEST


def relevance(feature_fn: FeatureFn, params: Params, x: Array, seed: Array, *, composite: Composite) -> Array:
    """Propagate relevance from the features of a batch to its inputs.

    Compiled once for each feature function, composite and shape: pass the same function object again, not a new lambda.

    Args:
        feature_fn: (params, x[b, ...]) -> features[b, d].
        params: its parameters.
        x: [b, ...] inputs; or tokens, whole numbers that the function looks up in an embedding table.
        seed: [b, d] relevance at the features.
        composite: which rule goes to which layer.

    Returns:
        [b, ...] relevance at the inputs, in units of the seed; of tokens [b, t] one number for each token, the sum over
        its row of the table. With `zero_bias` every map sums to its seed's sum up to
        what rules lose by nature (see the composites).

    Raises:
        ValueError: shapes that do not fit, x that is neither floating nor tokens, or something that is not a composite.
        NoRuleError: the function contains an operation that relevance cannot pass.
    """
    features = check_inputs(feature_fn, params, "x", x, composite)
    check_seed(seed, features)
    return _relevance(feature_fn, params, x, jnp.asarray(seed), composite)


def explain_pair(
    feature_fn: FeatureFn, params: Params, x_test: Array, x_train: Array, coefficient: Array, *, composite: Composite
) -> PairRelevance:
    """Why a training sample matters to a test sample: the pair's score, propagated to both inputs.

    Both maps start from coefficient · φ(x_train) ⊙ φ(x_test). Works under vmap; for many pairs see `explain_pairs`.

    Args:
        feature_fn: (params, x[b, ...]) -> features[b, d].
        params: its parameters.
        x_test: [...] one test input, without batch axis.
        x_train: [...] one training input.
        coefficient: scalar, the dual coefficient of the training sample for the class explained.
        composite: which rule goes to which layer.

    Returns:
        The two maps and the score coefficient · ⟨φ(x_train), φ(x_test)⟩.

    Raises:
        ValueError, NoRuleError: as `relevance`.

    Source: DualXDA (arXiv 2402.12118), section on XDA.
    """
    _check.shape("coefficient", coefficient, ())
    _check.numbers("coefficient", coefficient)
    for argument, sample in (("x_test", x_test), ("x_train", x_train)):
        _check_array(argument, sample)
    _check.shape("x_train", x_train, np.shape(x_test))
    one = explain_pairs(
        feature_fn, params, x_test[None], x_train[None], jnp.asarray(coefficient)[None], composite=composite
    )
    return jax.tree.map(lambda leaf: leaf[0], one)


def explain_pairs(
    feature_fn: FeatureFn,
    params: Params,
    x_test: Array,
    x_train: Array,
    coefficients: Array,
    *,
    composite: Composite,
    chunk_size: int = 32,
) -> PairRelevance:
    """`explain_pair` for many pairs, chunk by chunk: memory grows with chunk_size, not with the number of pairs.

    Args:
        feature_fn: (params, x[b, ...]) -> features[b, d].
        params: its parameters.
        x_test: [p, ...] test inputs, one for each pair.
        x_train: [p, ...] training inputs.
        coefficients: [p] dual coefficients.
        composite: which rule goes to which layer.
        chunk_size: pairs propagated at a time; over a mesh, rounded up to a multiple of its devices.

    Returns:
        PairRelevance with a leading axis p.

    Raises:
        ValueError, NoRuleError: as `relevance`.
    """
    check_inputs(feature_fn, params, "x_test", x_test, composite)
    _check_array("x_train", x_train)
    _check.shape("x_train", x_train, np.shape(x_test))
    _check.shape("coefficients", coefficients, np.shape(x_test)[:1])
    _check.numbers("coefficients", coefficients)
    if chunk_size < 1:
        _check.fail("chunk_size", chunk_size, "at least 1")
    if jnp.result_type(x_train) != jnp.result_type(x_test):
        _check.fail("x_train", jnp.result_type(x_train), f"of x_test's dtype {jnp.result_type(x_test)}")
    coefficients = jnp.asarray(coefficients)
    return _pairs(feature_fn, params, jnp.asarray(x_test), jnp.asarray(x_train), coefficients, composite, chunk_size)


def explain_logit(
    feature_fn: FeatureFn, params: Params, model: SupportModel, x: Array, target: Array, *, composite: Composite
) -> Array:
    """The surrogate's own heat map: its logit for one class, without intercept, propagated to the input.

    Args:
        feature_fn: (params, x[b, ...]) -> features[b, d].
        params: its parameters.
        model: the surrogate.
        x: [...] one input, without batch axis.
        target: the class.
        composite: which rule goes to which layer.

    Returns:
        Array like x; with zero_bias it sums to ⟨weights[target], φ(x)⟩.

    Raises:
        ValueError, NoRuleError: as `relevance`; target outside of 0..k-1, a surrogate of other features.
    """
    if not hasattr(model, "weights"):
        _check.fail("model", type(model).__name__, "a SupportModel, as svm.compress returns")
    _check.shape("target", target, ())
    _check.integers("target", target)
    _check.class_range("target", target, model.weights.shape[0])
    features = check_inputs(feature_fn, params, "x", jnp.asarray(x)[None], composite)
    k, d = np.shape(model.weights)
    if d != features.shape[1]:
        _check.fail("model", f"weights of shape {(k, d)}", f"[{k}, {features.shape[1]}], as many as feature_fn gives")
    return _logit(feature_fn, params, model.weights, jnp.asarray(x), jnp.asarray(target), composite)


def _check_array(argument: str, value: Any) -> None:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        _check.fail(argument, type(value).__name__, "an array")


def check_seed(seed: Any, features: Any) -> None:
    """Refuse relevance that is not of the features' shape."""
    _check.shape("seed", seed, features.shape)
    _check.numbers("seed", seed)


def check_inputs(feature_fn: FeatureFn, params: Params, argument: str, x: Array, composite: Composite) -> Any:
    """Refuse inputs that do not fit, and feature functions that are none; gives the features' shape and dtype."""
    transform.check_composite(composite)
    transform.check_callable("feature_fn", feature_fn)
    _check_array(argument, x)
    try:
        hash(feature_fn)
    except TypeError:
        _check.fail("feature_fn", f"an unhashable {type(feature_fn).__name__}", "hashable: it is a static argument")
    if np.ndim(x) < 1:
        _check.fail(argument, f"shape {np.shape(x)}", "[b, ...]")
    kinds = (jnp.floating, jnp.integer)
    if not any(jnp.issubdtype(jnp.result_type(x), kind) for kind in kinds):
        _check.fail(argument, f"dtype {jnp.result_type(x)}", "floating, or whole numbers that the function looks up")
    try:
        out = jax.eval_shape(feature_fn, params, x)
    except TypeError as error:
        if jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise
        was = f"dtype {jnp.result_type(x)}, which the function does not take"
        raise ValueError(f"{argument}: got {was}, must be floating, or tokens that it looks up") from error
    if getattr(out, "ndim", None) != 2 or out.shape[0] != np.shape(x)[0]:
        _check.fail("feature_fn", f"output {out} for {argument} of shape {np.shape(x)}", "features [b, d]")
    return out


def _propagator(feature_fn: FeatureFn, params: Params, x: Array, composite: Composite) -> Any:
    """The features of x and the function from their relevance to that of x."""
    traced = reach.build(feature_fn, (params,), x)
    planned = plan.make(traced, composite, seeded=True)
    inputs = [*jax.tree.leaves(params), x]

    def run(given: list[Array]) -> Array:
        return walk.run(planned, inputs, tap=lambda value, _: given[traced.sources.index(value)])[0]

    at = walk.sources(planned, inputs)
    features, transpose = jax.vjp(run, at)

    def propagate(seed: Array) -> Array:
        (arrived,) = transpose(seed.astype(features.dtype))
        maps = []
        for source, value, cotangent in zip(traced.sources, at, arrived, strict=True):
            given = source in planned.relevance or composite.seed == "gradient"
            found = cotangent if given else value * cotangent
            maps.append(found if source is traced.data else tokens.of_each(traced, source, found, inputs))
        return functools.reduce(jnp.add, maps)

    return features, propagate


@functools.partial(jax.jit, static_argnames=("feature_fn", "composite"))
def _relevance(feature_fn: FeatureFn, params: Params, x: Array, seed: Array, composite: Composite) -> Array:
    return _propagator(feature_fn, params, x, composite)[1](seed)


@functools.partial(jax.jit, static_argnames=("feature_fn", "composite"))
def _logit(
    feature_fn: FeatureFn, params: Params, weights: Array, x: Array, target: Array, composite: Composite
) -> Array:
    features, propagate = _propagator(feature_fn, params, x[None], composite)
    return propagate(weights[target].astype(features.dtype)[None] * features)[0]


def _pairs_at_once(
    feature_fn: FeatureFn, composite: Composite, params: Params, test: Array, train: Array, coefficients: Array
) -> PairRelevance:
    p = test.shape[0]
    # Both sides in one batch: one forward and one backward pass serve the two maps.
    features, propagate = _propagator(feature_fn, params, jnp.concatenate([test, train]), composite)
    seed = coefficients.astype(features.dtype)[:, None] * features[:p] * features[p:]
    maps = propagate(jnp.concatenate([seed, seed]))
    return PairRelevance(maps[:p], maps[p:], seed.sum(axis=1))


@functools.partial(jax.jit, static_argnames=("feature_fn", "composite", "chunk_size"))
def _pairs(
    feature_fn: FeatureFn,
    params: Params,
    x_test: Array,
    x_train: Array,
    coefficients: Array,
    composite: Composite,
    chunk_size: int,
) -> PairRelevance:
    p = x_test.shape[0]
    if p <= chunk_size:
        return _pairs_at_once(feature_fn, composite, params, x_test, x_train, coefficients)
    sharding = jax.typeof(x_test).sharding
    # As many pairs as there are devices at least: else some would idle.
    size = min(p, -(-chunk_size // max(1, sharding.mesh.size)) * max(1, sharding.mesh.size))
    count = -(-p // size)

    def split(leaf: Array) -> Array:
        # The last pair fills up the last chunk, so that every chunk has the same shape. Pair i is in chunk i mod count:
        # pairs that are sharded over devices stay there.
        filler = jnp.repeat(leaf[-1:], count * size - p, axis=0)
        return jnp.moveaxis(jnp.concatenate([leaf, filler]).reshape(size, count, *leaf.shape[1:]), 1, 0)

    def run(params: Params, *pairs: Array) -> PairRelevance:
        maps = jax.lax.map(
            lambda pair: _pairs_at_once(feature_fn, composite, params, *pair), jax.tree.map(split, pairs)
        )
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:])[:p], maps)

    if len(sharding.spec) and sharding.spec[0] is not None:
        # Over Explicit axes every line of `run` would have to say where its result lies.
        kinds = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
        axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
        rows = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
        run = jax.sharding.auto_axes(run, axes=axes, out_sharding=rows)
    return run(params, x_test, x_train, coefficients)
