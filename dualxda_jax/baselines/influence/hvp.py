"""Products of the mean loss's curvature with vectors, and the vectors: gradients of single samples.

Vectors [..., p] hold the chosen parameters in the order of their sorted paths, each in row-major order, as `rows.flat`.
The curvature is a mean over samples: of the loss's Hessian ("exact", forward over reverse), or of the Gauss-Newton
matrix Jᵀ (∂²loss/∂logits²) J ("ggn"), which is the same where the logits are linear in the parameters, and never
negative where the loss is convex in the logits. Samples and vectors are both taken in chunks.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax.baselines import rows
from dualxda_jax.baselines.gradients import fold_chunks, map_chunks, map_training, per_sample, spread
from dualxda_jax.baselines.protocol import Context
from dualxda_jax.baselines.select import Filter, Selection, select
from dualxda_jax.types import Array

_HIGHEST = jax.lax.Precision.HIGHEST

HESSIANS = ("exact", "ggn")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options that the Hessian methods share.

    Attributes:
        params: which parameters.
        hessian: "exact" or "ggn".
        chunk: samples at a time.
        vectors: vectors that are multiplied at a time.
        dtype: name of the dtype of training gradients, and of what they are multiplied with in `along`; None for that
            of the parameters. Curvatures and the gradients of queries are never rounded.
    """

    params: Filter
    hessian: str
    chunk: int
    vectors: int
    dtype: str | None = dataclasses.field(default=None, kw_only=True)


def selected(context: Context, config: Config) -> Selection:
    """The chosen parameters of the network that is explained."""
    return select(context.params, config.params, head=context.head)


def size(context: Context, config: Config) -> int:
    """p, how many chosen parameters there are."""
    return sum(leaf.size for leaf in selected(context, config).split(context.params)[0].values())


def dtype(context: Context) -> Any:
    """What vectors and curvatures are held in: float64 where any parameter is, else float32."""
    return rows.wide(*map(jnp.result_type, jax.tree.leaves(context.params)))


def as_tree(vectors: Array, like: Mapping[str, Array], *, dtype: Any = None) -> dict[str, Array]:
    """[..., p] -> path -> [..., *shape], in the dtypes of `like` or the one given."""
    tree, start = {}, 0
    for name in sorted(like):
        shape = like[name].shape
        stop = start + math.prod(shape)
        tree[name] = vectors[..., start:stop].reshape(*vectors.shape[:-1], *shape).astype(dtype or like[name].dtype)
        start = stop
    return tree


def as_vector(tree: Mapping[str, Array], batch: int = 0) -> Array:
    """Path -> [..., *shape] to [..., p] with `batch` leading axes, in float32 or wider."""
    wide = rows.accumulator(dict(tree))
    parts = [tree[name].reshape(*tree[name].shape[:batch], -1).astype(wide) for name in sorted(tree)]
    return jnp.concatenate(parts, axis=-1)


def product(
    context: Context,
    config: Config,
    damping: Any,
    vectors: Array,
    samples: tuple[Array, Array] | None = None,
) -> Array:
    """(H + λ) v for vectors [m, p].

    Args:
        context: the network and its training set.
        config: which curvature.
        damping: λ, a number.
        vectors: [m, p].
        samples: inputs [b, ...] and labels [b] to take the mean over; by default the training set.
    """
    selection = selected(context, config)
    chosen, rest = selection.split(context.params)
    samples = (context.inputs, context.labels) if samples is None else samples

    def some_vectors(vectors: Array) -> Array:
        directions = as_tree(vectors, chosen)

        def step(total: dict[str, Array], mask: Array, x: Array, labels: Array) -> dict[str, Array]:
            one = _exact if config.hessian == "exact" else _gauss_newton
            along = lambda v: one(context, selection, chosen, rest, v, mask, x, labels)  # noqa: E731
            try:
                more = jax.vmap(along)(directions)
            except NotImplementedError:
                # jax has no vmap over the kernel of a grouped convolution whose data lie on a mesh.
                more = jax.lax.map(along, directions)
            return jax.tree.map(jnp.add, total, more)

        total = fold_chunks(step, jax.tree.map(jnp.zeros_like, directions), samples, config.chunk)
        return as_vector(total, 1) / samples[1].shape[0] + damping * vectors

    with jax.default_matmul_precision("highest"):
        return map_chunks(some_vectors, (vectors,), config.vectors)


def _exact(
    context: Context, selection: Selection, chosen: Any, rest: Any, direction: Any, mask: Array, x: Array, labels: Array
) -> dict[str, Array]:
    def total_loss(chosen: dict[str, Array]) -> Array:
        values = jax.vmap(context.loss)(context.logits(selection.merge(chosen, rest), x), labels)
        return jnp.where(mask, values, jnp.zeros((), values.dtype)).sum()

    return jax.jvp(jax.grad(total_loss), (chosen,), (direction,))[1]


def _gauss_newton(
    context: Context, selection: Selection, chosen: Any, rest: Any, direction: Any, mask: Array, x: Array, labels: Array
) -> dict[str, Array]:
    def network(chosen: dict[str, Array]) -> Array:
        return context.logits(selection.merge(chosen, rest), x)

    def slope(logits: Array) -> Array:
        return jax.vmap(jax.grad(context.loss))(logits, labels)

    logits, back = jax.vjp(network, chosen)
    moved = jax.jvp(network, (chosen,), (direction,))[1]
    curved = jax.jvp(slope, (logits,), (moved,))[1]
    return back(jnp.where(mask[:, None], curved, jnp.zeros((), curved.dtype)))[0]


def gradients(context: Context, config: Config, x: Array, labels: Array) -> Array:
    """[b, p] gradients of the loss of samples x [b, ...], in chunks."""
    selection = selected(context, config)

    def some(x: Array, labels: Array) -> Array:
        found = per_sample(context.logits, context.loss, selection, context.params, x, labels, dtype=dtype(context))
        return rows.flat(found)

    return map_chunks(some, (x, labels), spread(config.chunk))


@functools.partial(jax.jit, static_argnums=1)
def gradient_sums(context: Context, config: Config) -> Array:
    """[n] sum of the gradient of every training sample: not finite where the gradient is not."""

    def some(x: Array, labels: Array) -> Array:
        found = per_sample(context.logits, context.loss, selected(context, config), context.params, x, labels)
        leaves = (leaf.astype(rows.accumulator(found)) for leaf in jax.tree.leaves(found))
        return sum(leaf.reshape(leaf.shape[0], -1).sum(axis=1) for leaf in leaves)

    return map_training(some, context, config.chunk)


def along(context: Context, config: Config, vectors: Array, x: Array, labels: Array) -> Array:
    """[b, m] inner products of the gradients of samples x [b, ...] with vectors [m, p], in chunks of samples.

    Both are rounded to the configured dtype; products accumulate in that of the vectors.
    """
    selection, rounded = selected(context, config), config.dtype or vectors.dtype
    held = as_tree(vectors, selection.split(context.params)[0], dtype=rounded)

    def some(x: Array, labels: Array) -> Array:
        found = per_sample(context.logits, context.loss, selection, context.params, x, labels, dtype=rounded)
        return sum_products(held, found, vectors.dtype)

    return map_chunks(some, (x, labels), spread(config.chunk))


def against_training(context: Context, config: Config, vectors: Array) -> Array:
    """[m, n] inner products of vectors [m, p] with the gradients of the training samples."""
    return along(context, config, vectors, context.inputs, context.labels).T


def sum_products(held: dict[str, Array], found: rows.Rows, dtype: Any) -> Array:
    """[b, m] inner products of m dense gradients with b others of the same dtype, which may be outer products.

    Accumulated in the dtype given.
    """
    m = jax.tree.leaves(held)[0].shape[0]
    total = jnp.zeros((rows.count(found), m), dtype)
    for name, entry in found.items():
        if isinstance(entry, rows.Outer):
            met = jnp.einsum("bi,mio->bmo", entry.left, held[name], precision=_HIGHEST, preferred_element_type=dtype)
            total += jnp.einsum("bmo,bo->bm", met, entry.right.astype(dtype), precision=_HIGHEST)
        else:
            total += rows.products(entry.reshape(len(entry), -1), held[name].reshape(len(held[name]), -1), total.dtype)
    return total
