"""Gradients of one sample each, in bounded chunks of samples."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.baselines import placement, taps
from dualxda_jax.baselines.protocol import Context, Logits, Loss
from dualxda_jax.baselines.rows import Rows, dense, wide
from dualxda_jax.baselines.select import Selection
from dualxda_jax.types import Array, Params

_CPU_CHUNK = 64


def per_sample(
    logits: Logits,
    loss: Loss,
    selection: Selection,
    params: Params,
    x: Array,
    labels: Array,
    *,
    dtype: Any = None,
    factored: bool = True,
) -> Rows:
    """Gradient of the loss of every sample with respect to the chosen parameters.

    Computed for all b samples at once by vmap: for more than a chunk, call it inside of `map_chunks`.

    Args:
        logits: (params, x[b, ...]) -> [b, k].
        loss: (logits [k], label) -> scalar, differentiable.
        selection: which parameters.
        params: all parameters.
        x: [b, ...] inputs.
        labels: [b] integers.
        dtype: of the result, as bfloat16; by default that of the parameters. Gradients are computed in the latter.
        factored: leave outer products as `Outer`; False makes every entry an array.

    Returns:
        Rows: path -> [b, *shape] or `Outer`.

    Raises:
        ValueError: the loss is not a scalar.
    """
    chosen, rest = selection.split(params)

    def value(chosen: dict[str, Array], rest: tuple[Array, ...], x: Array, label: Array) -> Array:
        return loss(logits(selection.merge(chosen, rest), x[None])[0], label)

    shapes = jax.eval_shape(lambda c, r, x, y: (c, r, x[0], y[0]), chosen, rest, x, labels)
    closed, scalar = jax.make_jaxpr(value, return_shape=True)(*shapes)
    if scalar.shape != ():
        _check.fail("loss", f"a result of shape {scalar.shape}", "a function to a scalar")
    # A dict's leaves come in the order of its sorted keys.
    names = [*sorted(chosen), *[None] * (len(jax.tree.leaves(shapes)) - len(chosen))]
    tapped = taps.find(closed, names)
    plain = {name: leaf for name, leaf in chosen.items() if name not in tapped}
    probes = {name: jnp.zeros(tap.shape, tap.dtype) for name, tap in tapped.items()}

    def sample(x: Array, label: Array) -> tuple[Any, ...]:
        def run(plain: dict[str, Array], probes: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
            leaves = jax.tree.leaves((chosen | plain, rest, x, label))
            outputs, met = taps.evaluate(closed, names, leaves, tapped, probes)
            return outputs[0], met

        (found, ends), met = jax.grad(run, argnums=(0, 1), has_aux=True)(plain, probes)
        return found, ends, met

    found, ends, met = jax.vmap(sample)(x, labels)
    rows: Rows = found | {name: taps.gradient(tap, met[name], ends[name]) for name, tap in tapped.items()}
    if dtype is not None:
        rows = jax.tree.map(lambda a: a.astype(dtype), rows)
    return rows if factored else dense(rows)  # type: ignore[return-value]


def map_chunks(fn: Callable[..., Any], arrays: tuple[Array, ...], chunk: int, *, unroll: int = 1) -> Any:
    """Apply a function to samples chunk by chunk and stack what it gives; one compiled shape.

    Sample i is in chunk i mod m: samples that are sharded over a mesh stay on their device, and each device computes
    its share of every chunk (where the devices divide `chunk` and `chunk` divides n; else some samples move).

    Args:
        fn: (array[c, ...], ...) -> pytree of [c, ...]; rows must not depend on each other.
        arrays: each [n, ...].
        chunk: c, samples at a time; the last chunk is filled up with zeros whose results are dropped.
        unroll: chunks whose operations the compiler may run side by side.

    Returns:
        The pytree with [n, ...] in place of [c, ...].
    """
    n = arrays[0].shape[0]
    c = min(chunk, n)
    parts = tuple(_parts(a, c) for a in arrays)
    _, stacked = jax.lax.scan(lambda _, part: (None, fn(*part)), None, parts, unroll=unroll)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])[:n], stacked)


def spread(chunk: int) -> int:
    """The chunk for samples that may lie over the devices of a mesh: rounded up to a multiple of these.

    With fewer the compiler cuts a result into parts that jax 0.8 has no name for, and devices would idle.
    """
    devices = placement.devices()
    return -(-chunk // devices) * devices


def map_training(fn: Callable[..., Any], context: Context, chunk: int) -> Any:
    """`map_chunks` over inputs and labels of the training samples, the chunk rounded up by `spread`."""
    return map_chunks(fn, (context.inputs, context.labels), spread(chunk))


def map_forward(fn: Callable[..., Any], x: Array, chunk: int) -> Any:
    """`map_chunks` for a pass through a network without derivatives: fn maps [c, ...] to a pytree of [c, ...].

    What comes out is in float32 or wider: products of features are to accumulate in that.

    On CPUs two chunks of at most 64 samples run side by side. XLA's convolutions with few channels use one core each
    there, and the paper's CNN takes four fifths of the time of chunks of 256 on two cores.
    """

    def run(x: Array, chunk: int, unroll: int) -> Any:
        found = map_chunks(fn, (x,), spread(chunk), unroll=unroll)
        return jax.tree.map(lambda a: a.astype(wide(a.dtype)), found)

    on_cpu = functools.partial(run, chunk=min(chunk, _CPU_CHUNK), unroll=2)
    return jax.lax.platform_dependent(x, cpu=on_cpu, default=functools.partial(run, chunk=chunk, unroll=1))


def fold_chunks(step: Callable[..., Any], init: Any, arrays: tuple[Array, ...], chunk: int) -> Any:
    """Accumulate over samples chunk by chunk; one compiled shape, nothing stacked.

    Args:
        step: (carry, mask[c], array[c, ...], ...) -> carry; rows where the mask is False are filled-up zeros.
        init: the first carry.
        arrays: each [n, ...].
        chunk: c, samples at a time; see `map_chunks` for which.
    """
    n = arrays[0].shape[0]
    c = min(chunk, n)
    mask = jnp.ones(n, bool)
    parts = tuple(_parts(a, c) for a in (mask, *arrays))
    return jax.lax.scan(lambda carry, part: (step(carry, *part), None), init, parts)[0]


def _parts(array: Array, chunk: int) -> Array:
    """[m, chunk, ...], part j holding the samples j, j + m, j + 2m, …"""
    n = array.shape[0]
    m = -(-n // chunk)
    padded = jnp.pad(array, [(0, m * chunk - n)] + [(0, 0)] * (array.ndim - 1))
    return jnp.moveaxis(padded.reshape(chunk, m, *array.shape[1:]), 1, 0)


def check_finite(argument: str, per_sample: Array) -> None:
    """Name the samples whose value [n] is not finite; does nothing inside a trace, where values are unknown.

    Raises:
        ValueError: with how many and the first of them.
    """
    if _check.is_traced(per_sample):
        return
    values = np.asarray(per_sample)
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1).astype(np.float64)).all(axis=1))
    if bad.size:
        first = ", ".join(map(str, bad[:5]))
        _check.fail(argument, f"NaN or Inf at {bad.size} of {len(values)} samples (first: {first})", "finite")
