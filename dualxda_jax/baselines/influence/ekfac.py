"""Influence functions with a Kronecker-factored curvature whose eigenvalues are corrected (EK-FAC), and plain K-FAC.

The curvature of a layer is the mean over the training samples of Σ_r g_r g_rᵀ, where g_r = Σ_t a_t δ_rtᵀ are
pseudo-gradients: gradients at a label drawn from the model (the Fisher information), at the training label (the
empirical Fisher), or the columns of a root of the Gauss-Newton matrix. Different layers count as independent. Within
a layer K-FAC takes a and δ as independent: curvature ≈ A ⊗ B with A = E[Σ_t a_t a_tᵀ] and B = E[mean_t Σ_r δ_rt
δ_rtᵀ]. EK-FAC keeps the eigenvectors of A and B alone and measures the curvature along each product of two of them.

Everything is held and computed in that eigenbasis: per layer [inputs, outputs] numbers, nothing of the size of their
square. The two passes over the training set are folds whose state is a pytree, so that they can be stopped and resumed.

Sources: Martens and Grosse 2015 (K-FAC); Grosse and Martens 2016 (convolutions); George et al. 2018 (EK-FAC); Grosse
et al. 2023, arXiv 2308.03296 (influence functions).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax import _check
from dualxda_jax.baselines.gradients import map_chunks, map_training
from dualxda_jax.baselines.influence import checks, curvature, hvp, layers
from dualxda_jax.baselines.influence.curvature import State
from dualxda_jax.baselines.influence.layers import Layers
from dualxda_jax.baselines.protocol import Context, Method, Stages, check_queries, staged
from dualxda_jax.baselines.select import Filter, select
from dualxda_jax.baselines.settings import dtype_name
from dualxda_jax.types import Array

_HIGHEST = jax.lax.Precision.HIGHEST
_QUERY_BUDGET = 1 << 27  # entries of the queries' gradients that are held at a time

_BLOCK = 16_384  # samples between two states that a resumable fit keeps

Bases = dict[str, dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The hyper-parameters of `influence_ekfac` that compiled functions depend on."""

    params: Filter
    fisher: str
    chunk: int
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyper-parameters of `influence_ekfac`, see there."""

    compiled: Compiled
    damping: float | None
    kfac: bool
    max_samples: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` gives.

    Attributes:
        context: the network and its training set.
        bases: path of the kernel -> "inputs" [inputs, inputs] and "outputs" [outputs, outputs], the eigenvectors of A
            and B in columns, and "values" [inputs, outputs], the curvature along each pair of them.
    """

    context: Context
    bases: Bases


def influence_ekfac(
    *,
    params: Filter = "all",
    damping: float | None = 1e-8,
    fisher: str = "sampled",
    kfac: bool = False,
    max_samples: int = 100_000,
    chunk: int = 128,
    dtype: Any = None,
) -> Method:
    """Influence functions by EK-FAC, over dense and convolution layers of any network.

    The score of sample i for target c at x is Σ_layers gᵀ (F + λ)⁻¹ g_i with g the gradient of the loss at (x, c),
    g_i that at (x_i, y_i) and F the mean curvature of a training sample: to first order n times what the loss at (x,
    c) would rise by, were i left out of a training by the mean loss. Higher = speaks for the target. Parameters in no
    dense or convolution layer count as fixed; `influence.left_out` names them with the reason.

    Args:
        params: which parameters, see `select`.
        damping: λ, added to every eigenvalue. 0 gives the pseudo-inverse: directions without curvature, up to rounding,
            have no influence. None stands for a tenth of each layer's mean eigenvalue (Grosse et al. 2023).
        fisher: "sampled": one label drawn from the softmax of the logits for every sample and pass, for cross-entropy;
            "empirical": the training labels; "ggn": the whole Gauss-Newton matrix of any loss that is convex in the
            logits, k times as many backward passes, no randomness. For cross-entropy it is the expectation of
            "sampled".
        kfac: plain K-FAC, without the correction of the eigenvalues.
        max_samples: how many training samples the curvature is taken over, drawn at random if there are more.
        chunk: samples at a time.
        dtype: what training gradients and preconditioned gradients of queries, both in the eigenbasis, are rounded to
            in `scores`, as "bfloat16"; products accumulate in float32 or wider. The curvature and self-influence are
            not rounded. By default nothing is.

    Returns:
        Method "influence_ekfac", or "influence_kfac".

    Raises:
        ValueError: a bad argument; and in `fit`: parameters that no layer holds, NaN or Inf in a gradient.
    """
    if damping is not None:
        damping = checks.nonnegative("damping", damping)
    checks.one_of("fisher", fisher, tuple(curvature.SOURCES))
    _check.positive_integer("max_samples", max_samples)
    _check.positive_integer("chunk", chunk)
    config = Config(Compiled(params, fisher, chunk, dtype_name(dtype)), damping, kfac, max_samples)

    def scores(fitted: Fitted, x: Array, targets: Array) -> Array:
        targets = check_queries(fitted.context, x, targets)
        return checks.finite_scores(_scores(config.compiled, damping, fitted, jnp.asarray(x), targets))

    def self_influence(fitted: Fitted) -> Array:
        return checks.finite_samples(_self_influence(config.compiled, damping, fitted))

    stages = Stages(config, functools.partial(_count, config), functools.partial(_part, config), _join)
    return staged("influence_kfac" if kfac else "influence_ekfac", stages, scores, self_influence)


def left_out(context: Context, params: Filter = "all") -> dict[str, str]:
    """Chosen parameters that belong to no dense or convolution layer, and why; EK-FAC takes them as fixed."""
    return dict(_find(context, params).left_out)


def _blocks(config: Config, context: Context) -> int:
    """How many parts each pass over the training set is cut into."""
    return -(-min(context.inputs.shape[0], config.max_samples) // _BLOCK)


def _count(config: Config, context: Context) -> int:
    """The blocks of the first pass, the eigendecomposition, the blocks of the second pass."""
    return _blocks(config, context) * (1 if config.kfac else 2) + 1


def _part(config: Config, key: Array, context: Context, earlier: tuple[Any, ...]) -> Any:
    """The sums of a pass up to the next block, or what comes of them."""
    blocks, number = _blocks(config, context), len(earlier)
    found, dtype = _find(context, config.compiled.params), hvp.dtype(context)
    count = min(context.inputs.shape[0], config.max_samples)
    if number == blocks:
        return _eigenbases(earlier[-1], count)
    first, block = number < blocks, number % (blocks + 1)
    samples = _samples(config, key, context, block)
    if first:
        state = earlier[-1] if block else curvature.start_covariances(found, dtype)
        state = covariance_step(config.compiled, context, key, state, samples)
    else:
        state = earlier[-1] if block else curvature.start_eigenvalues(found, dtype)
        state = eigenvalue_step(config.compiled, context, key, earlier[blocks], state, samples)
    checks.finite_state(state["bad"])
    return corrected(earlier[blocks], state, count) if not first and block == blocks - 1 else state


def _join(key: Array, context: Context, parts: tuple[Any, ...]) -> Fitted:
    return Fitted(context, parts[-1])


def _find(context: Context, params: Filter) -> Layers:
    selection = select(context.params, params, head=context.head)
    found = layers.find(context.logits, context.params, context.inputs[0], selection)
    if not found.layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in found.left_out.items())
        _check.fail(
            "params", f"{params!r}, which is in no dense or convolution layer ({why})", "kernels of such layers"
        )
    return found


def _samples(config: Config, key: Array, context: Context, block: int) -> tuple[Array, ...]:
    """Inputs, labels and numbers of one block of the samples that the curvature is taken over."""
    n, some = context.inputs.shape[0], slice(block * _BLOCK, min((block + 1) * _BLOCK, config.max_samples))
    if n <= config.max_samples:
        every = context.inputs, context.labels, jnp.arange(n, dtype=jnp.int32)
        return every if n <= _BLOCK else tuple(array[some] for array in every)
    chosen = jax.random.permutation(jax.random.fold_in(key, 2), n)[some].astype(jnp.int32)
    return context.inputs[chosen], context.labels[chosen], chosen


@functools.partial(jax.jit, static_argnums=0)
def covariance_step(config: Compiled, context: Context, key: Array, state: State, samples: tuple[Array, ...]) -> State:
    """The first pass over some more samples."""
    found = _find(context, config.params)
    sources = curvature.SOURCES[config.fisher](context.loss)
    key = jax.random.fold_in(key, 0)
    return curvature.add_covariances(found, sources, context.params, state, samples, key, config.chunk)


_eigenbases = jax.jit(curvature.eigenbases, static_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def eigenvalue_step(
    config: Compiled, context: Context, key: Array, bases: Bases, state: State, samples: tuple[Array, ...]
) -> State:
    """The second pass over some more samples."""
    found = _find(context, config.params)
    sources = curvature.SOURCES[config.fisher](context.loss)
    key = jax.random.fold_in(key, 1)
    return curvature.add_eigenvalues(found, sources, context.params, bases, state, samples, key, config.chunk)


def corrected(bases: Bases, state: State, count: int) -> Bases:
    """The bases with the eigenvalues of the second pass."""
    return {name: {**basis, "values": state["values"][name] / count} for name, basis in bases.items()}


def _inverse(values: Array, damping: Array | None) -> Array:
    """1 / (values + λ); 0 where there is neither curvature, up to rounding, nor damping."""
    added = 0.1 * jnp.mean(values) if damping is None else jnp.asarray(damping, values.dtype)
    least = jnp.max(values) * float(jnp.finfo(values.dtype).eps) * max(values.shape)
    known = values + added > jnp.where(added == 0, least, 0.0)
    return jnp.where(known, 1.0 / jnp.where(known, values + added, 1.0), 0.0)


def _gradients(context: Context, found: Layers, x: Array, labels: Array) -> list[tuple[Array, Array]]:
    """Factors a [b, t, inputs] and δ [b, t, outputs] of the loss at the labels, for every layer."""

    def one(x: Array, label: Array) -> list[tuple[Array, Array]]:
        seeds = lambda logits: jax.grad(context.loss)(logits, label)[None]  # noqa: E731
        return [(a, delta[0]) for a, delta in layers.factors(found, context.params, x, seeds)]

    return jax.vmap(one)(x, labels)


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: Compiled, damping: Array | None, fitted: Fitted, x: Array, targets: Array) -> Array:
    context, bases = fitted.context, fitted.bases
    found = _find(context, config.params)
    size, wide = sum(layer.inputs * layer.outputs for layer in found.layers), hvp.dtype(context)

    def some_queries(x: Array, targets: Array) -> Array:
        held = []
        for layer, (a, delta) in zip(found.layers, _gradients(context, found, x, targets), strict=True):
            held.append(_preconditioned(bases[layer.name], a, delta, damping).astype(config.dtype or wide))

        queries = len(targets)

        def some_samples(x: Array, labels: Array) -> Array:
            total = jnp.zeros((len(x), queries), wide)
            for layer, query, (a, delta) in zip(found.layers, held, _gradients(context, found, x, labels), strict=True):
                total += _products(bases[layer.name], query, a, delta)
            return total

        return map_training(some_samples, context, config.chunk).T

    return map_chunks(some_queries, (x, targets), max(1, _QUERY_BUDGET // size))


def _preconditioned(basis: dict[str, Array], a: Array, delta: Array, damping: Array | None) -> Array:
    """Queries' gradients times the inverse curvature, in the eigenbasis, as `_products` takes them.

    [q, inputs, outputs]; but [inputs, q, outputs] where there is one position, so that the product with each chunk of
    samples is one product of two matrices and no copy of what is most of the memory.
    """
    inverse = _inverse(basis["values"], damping)
    if a.shape[1] > 1:
        return curvature.rotate(basis, a, delta) * inverse[None]
    a, delta = _turned(basis, a, delta)
    return a.T[:, :, None] * delta[None] * inverse[:, None, :]


def _products(basis: dict[str, Array], query: Array, a: Array, delta: Array) -> Array:
    """Inner products [b, q] of gradients a, δ with queries from `_preconditioned`, rounded as these are."""
    dtype = basis["inputs"].dtype
    if a.shape[1] > 1:
        gradient = curvature.rotate(basis, a, delta).astype(query.dtype)
        return jnp.einsum("bio,qio->bq", gradient, query, precision=_HIGHEST, preferred_element_type=dtype)
    # One position: the gradient is an outer product, which need not be written out.
    a, delta = (factor.astype(query.dtype) for factor in _turned(basis, a, delta))
    every = query.reshape(query.shape[0], -1)
    met = jnp.matmul(a, every, precision=_HIGHEST, preferred_element_type=dtype).reshape(len(a), *query.shape[1:])
    return jnp.einsum("bqo,bo->bq", met, delta.astype(dtype), precision=_HIGHEST)


def _turned(basis: dict[str, Array], a: Array, delta: Array) -> tuple[Array, Array]:
    """The factors at the only position, in the eigenbasis."""
    return (
        jnp.matmul(a[:, 0], basis["inputs"], precision=_HIGHEST),
        jnp.matmul(delta[:, 0], basis["outputs"], precision=_HIGHEST),
    )


@functools.partial(jax.jit, static_argnums=0)
def _self_influence(config: Compiled, damping: Array | None, fitted: Fitted) -> Array:
    context, bases = fitted.context, fitted.bases
    found = _find(context, config.params)
    inverses = {name: _inverse(basis["values"], damping) for name, basis in bases.items()}

    def some_samples(x: Array, labels: Array) -> Array:
        total = jnp.zeros(len(x), hvp.dtype(context))
        for layer, (a, delta) in zip(found.layers, _gradients(context, found, x, labels), strict=True):
            total += _squared_norms(bases[layer.name], a, delta, inverses[layer.name])
        return total

    return map_training(some_samples, context, config.chunk)


def _squared_norms(basis: dict[str, Array], a: Array, delta: Array, inverse: Array) -> Array:
    """[b] Σ (gradient in the eigenbasis)² · inverse of gradients a, δ."""
    if a.shape[1] > 1:
        gradient = curvature.rotate(basis, a, delta)
        return jnp.einsum("bio,bio,io->b", gradient, gradient, inverse, precision=_HIGHEST)
    a, delta = _turned(basis, a, delta)
    return jnp.sum(jnp.matmul(a * a, inverse, precision=_HIGHEST) * (delta * delta), axis=1)
