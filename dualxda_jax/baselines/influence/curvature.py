"""The two passes of EK-FAC over the training set, as folds: covariances of the factors, then corrected eigenvalues.

A state is a dict of arrays. Sums are taken over whatever samples a step is given, in any order and number of steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax.baselines.gradients import fold_chunks
from dualxda_jax.baselines.influence import layers
from dualxda_jax.baselines.influence.layers import Layers
from dualxda_jax.baselines.protocol import Loss
from dualxda_jax.baselines.rows import wide
from dualxda_jax.types import Array, Params

_HIGHEST = jax.lax.Precision.HIGHEST

State = dict[str, Any]
Sources = Callable[[Array, Array, Array], Array]
"""(logits [k], label, key) -> [r, k] vectors whose outer products sum to the curvature in the logits."""


def sampled(loss: Loss) -> Sources:
    """The gradient at a label drawn from the model: the Fisher information of cross-entropy."""

    def sources(logits: Array, label: Array, key: Array) -> Array:
        return jax.grad(loss)(logits, jax.random.categorical(key, logits).astype(label.dtype))[None]

    return sources


def empirical(loss: Loss) -> Sources:
    """The gradient at the training label."""
    return lambda logits, label, key: jax.grad(loss)(logits, label)[None]


def gauss_newton(loss: Loss) -> Sources:
    """Columns of a root of the loss's Hessian in the logits; negative curvature counts as none."""

    def sources(logits: Array, label: Array, key: Array) -> Array:
        values, vectors = jnp.linalg.eigh(jax.hessian(loss)(logits.astype(wide(logits.dtype)), label))
        return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None, :]).T.astype(logits.dtype)

    return sources


SOURCES: dict[str, Callable[[Loss], Sources]] = {"sampled": sampled, "empirical": empirical, "ggn": gauss_newton}


def start_covariances(found: Layers, dtype: Any) -> State:
    """Zero sums over no samples."""
    return {
        "inputs": {v.name: jnp.zeros((v.inputs, v.inputs), dtype) for v in found.layers},
        "outputs": {v.name: jnp.zeros((v.outputs, v.outputs), dtype) for v in found.layers},
        "bad": jnp.zeros(2, jnp.int32),
    }


def start_eigenvalues(found: Layers, dtype: Any) -> State:
    """Zero sums over no samples."""
    values = {v.name: jnp.zeros((v.inputs, v.outputs), dtype) for v in found.layers}
    return {"values": values, "bad": jnp.zeros(2, jnp.int32)}


def add_covariances(
    found: Layers, sources: Sources, params: Params, state: State, samples: tuple[Array, ...], key: Array, chunk: int
) -> State:
    """Add Σ_t a aᵀ and the mean over t of Σ_r δ δᵀ of every sample.

    Args:
        found: the layers.
        sources: of the curvature.
        params: the parameters.
        state: so far.
        samples: inputs [m, ...], labels [m] and their numbers [m] in the training set.
        key: random numbers depend on it and the sample's number.
        chunk: samples at a time.
    """

    def step(state: State, mask: Array, *samples: Array) -> State:
        pairs = _pairs(found, sources, params, samples, key)
        inputs, outputs = dict(state["inputs"]), dict(state["outputs"])
        for layer, (a, delta) in zip(found.layers, pairs, strict=True):
            a, delta = _masked(a, mask), _masked(delta, mask)
            inputs[layer.name] += jnp.einsum("bti,btj->ij", a, a, precision=_HIGHEST)
            outputs[layer.name] += jnp.einsum("brto,brtp->op", delta, delta, precision=_HIGHEST) / delta.shape[2]
        return {"inputs": inputs, "outputs": outputs, "bad": _count_bad(state["bad"], pairs, mask, samples[-1])}

    return fold_chunks(step, state, samples, chunk)


def eigenbases(state: State, count: int) -> dict[str, dict[str, Array]]:
    """Eigenvectors of the two mean covariances of every layer, and the product of their eigenvalues (K-FAC)."""
    bases = {}
    for name, a in state["inputs"].items():
        a_values, a_vectors = jnp.linalg.eigh(a / count)
        b_values, b_vectors = jnp.linalg.eigh(state["outputs"][name] / count)
        values = jnp.maximum(a_values, 0.0)[:, None] * jnp.maximum(b_values, 0.0)[None, :]
        bases[name] = {"inputs": a_vectors, "outputs": b_vectors, "values": values}
    return bases


def add_eigenvalues(
    found: Layers,
    sources: Sources,
    params: Params,
    bases: dict[str, dict[str, Array]],
    state: State,
    samples: tuple[Array, ...],
    key: Array,
    chunk: int,
) -> State:
    """Add Σ_r (Q_Aᵀ g_r Q_B)² of every sample; arguments as in `add_covariances`."""

    def step(state: State, mask: Array, *samples: Array) -> State:
        pairs = _pairs(found, sources, params, samples, key)
        values = dict(state["values"])
        for layer, (a, delta) in zip(found.layers, pairs, strict=True):
            values[layer.name] += squares(bases[layer.name], a, _masked(delta, mask))
        return {"values": values, "bad": _count_bad(state["bad"], pairs, mask, samples[-1])}

    return fold_chunks(step, state, samples, chunk)


def squares(basis: dict[str, Array], a: Array, delta: Array) -> Array:
    """Σ over samples and r of the squared gradients in the eigenbasis, [inputs, outputs]."""
    if a.shape[1] == 1:
        rows = jnp.square(jnp.matmul(a[:, 0], basis["inputs"], precision=_HIGHEST))
        columns = jnp.square(jnp.matmul(delta[:, :, 0], basis["outputs"], precision=_HIGHEST)).sum(axis=1)
        return jnp.matmul(rows.T, columns, precision=_HIGHEST)

    def add(total: Array, delta: Array) -> tuple[Array, None]:
        return total + jnp.square(rotate(basis, a, delta)).sum(axis=0), None

    return jax.lax.scan(add, jnp.zeros_like(basis["values"]), jnp.moveaxis(delta, 1, 0))[0]


def rotate(basis: dict[str, Array], a: Array, delta: Array) -> Array:
    """Gradients in the eigenbasis [b, inputs, outputs] from a [b, t, inputs] and δ [b, t, outputs]."""
    t, inputs, outputs = a.shape[1], a.shape[2], delta.shape[2]
    if t * (inputs**2 + outputs**2) < inputs * outputs * (inputs + outputs):
        a = jnp.matmul(a, basis["inputs"], precision=_HIGHEST)
        delta = jnp.matmul(delta, basis["outputs"], precision=_HIGHEST)
        return jnp.einsum("bti,bto->bio", a, delta, precision=_HIGHEST)
    gradient = jnp.einsum("bti,bto->bio", a, delta, precision=_HIGHEST)
    gradient = jnp.matmul(gradient, basis["outputs"], precision=_HIGHEST)
    return jnp.einsum("bio,ij->bjo", gradient, basis["inputs"], precision=_HIGHEST)


def _pairs(
    found: Layers, sources: Sources, params: Params, samples: tuple[Array, ...], key: Array
) -> list[tuple[Array, Array]]:
    """Factors a [b, t, inputs] and δ [b, r, t, outputs] of every layer."""

    def one(x: Array, label: Array, number: Array) -> list[tuple[Array, Array]]:
        fresh = jax.random.fold_in(key, number)
        return layers.factors(found, params, x, lambda logits: sources(logits, label, fresh))

    return jax.vmap(one)(*samples)


def _masked(array: Array, mask: Array) -> Array:
    return jnp.where(mask.reshape(-1, *(1,) * (array.ndim - 1)), array, jnp.zeros((), array.dtype))


def _count_bad(bad: Array, pairs: list[tuple[Array, Array]], mask: Array, numbers: Array) -> Array:
    """How many samples had NaN or Inf, and the first of them."""
    sums = sum(jnp.sum(v.reshape(v.shape[0], -1), axis=1) for pair in pairs for v in pair)
    here = mask & ~jnp.isfinite(sums)
    first = jnp.min(jnp.where(here, numbers, jnp.iinfo(jnp.int32).max))
    known = jnp.where(bad[0] == 0, first, jnp.minimum(bad[1], first))
    count = bad[0] + here.sum(dtype=jnp.int32)
    return jnp.stack([count, jnp.where(count == 0, 0, known)])
