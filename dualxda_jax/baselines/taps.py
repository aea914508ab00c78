"""Where a parameter enters a function as the matrix of a linear operation, and what meets it there.

The gradient of one sample with respect to a weight matrix is an outer product of the layer's input and of the loss's
gradient at the layer's output. Both are small; the product is not. So the function of one sample is traced, a matrix
that is used once, in one product with one vector, is found in its equations, and the function is run with a zero added
to that product's result: the derivative with respect to the zero is the one factor, the vector is the other.

The kernel of a convolution that is used once is found in the same way; its gradient is a product of patches and
derivatives for each sample. vmap would make a grouped convolution of it, which is no faster, and which XLA gets wrong
where the samples are sharded (jaxlib 0.10.2, CPU).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from dualxda_jax.baselines.rows import Outer
from dualxda_jax.types import Array
from dualxda_jax.xda import _compat

# Computed equation by equation when a parameter enters; custom derivatives and loops are left whole.
_OPENED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Tap:
    """A matrix that is used once, in a product with one vector; or a kernel used once, in one convolution.

    Attributes:
        operand: its place among the operands, 0 or 1.
        contracted: which axis of a matrix the vector meets.
        shape: shape of the operation's result.
        dtype: its dtype.
        convolution: the parameters of the convolution, or None for a product.
    """

    operand: int
    contracted: int
    shape: tuple[int, ...]
    dtype: Any
    convolution: dict[str, Any] | None = None


def find(closed: Any, names: Sequence[str | None]) -> dict[str, Tap]:
    """Taps of a traced function.

    Args:
        closed: the ClosedJaxpr.
        names: for every argument of it, the name of the parameter that it is, or None.

    Returns:
        A tap for every parameter that is used nowhere but in one product with one vector or one convolution.
    """
    uses: dict[str, list[Tap | None]] = {}
    for name, tap in _uses(closed.jaxpr, names):
        uses.setdefault(name, []).append(tap)
    return {name: found[0] for name, found in uses.items() if len(found) == 1 and found[0] is not None}


def evaluate(
    closed: Any, names: Sequence[str | None], values: Sequence[Any], taps: Mapping[str, Tap], probes: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Array]]:
    """Run a traced function with a probe added to the result of every tapped product.

    Args:
        closed: the ClosedJaxpr.
        names: as in `find`.
        values: its arguments.
        taps: what `find` gave.
        probes: for every tap an array of its shape and dtype.

    Returns:
        The function's outputs; and for every tap what met the parameter: a vector [contracted axis's size], or the
        input of the convolution.
    """
    vectors: dict[str, Array] = {}

    def visit(name: str, equation: Any, operands: Sequence[Any]) -> tuple[Any, ...]:
        results = _compat.bind(equation, operands)
        if name not in taps:
            return results
        met = operands[1 - taps[name].operand]
        vectors[name] = met.reshape(-1) if taps[name].convolution is None else met
        return (results[0] + probes[name],)

    return _run(closed.jaxpr, closed.consts, values, names, visit), vectors


def gradient(tap: Tap, met: Array, ends: Array) -> Array | Outer:
    """Gradients with respect to a tapped parameter.

    Args:
        tap: what `find` gave.
        met: what `evaluate` gave for it, for b samples: [b, ...].
        ends: gradients with respect to its probe, [b, ...].

    Returns:
        `Outer` for a matrix, [b, *shape of the kernel] for a kernel.
    """
    if tap.convolution is None:
        pair = (met, ends.reshape(ends.shape[0], -1))
        return Outer(*(pair if tap.contracted == 0 else pair[::-1]))
    inputs_spec, kernel_spec, out_spec = tap.convolution["dimension_numbers"]
    # Every sample is a batch of one: [b, 1, ...] -> [b, channels, positions...].
    inputs, ends = (
        jnp.take(a.transpose(0, *(1 + axis for axis in spec)), 0, axis=1)
        for a, spec in ((met, inputs_spec), (ends, out_spec))
    )
    kernel = tap.convolution["kernel"]
    sizes = [kernel[axis] for axis in kernel_spec]
    patches = _patches(inputs, sizes[2:], ends.shape[2:], tap.convolution)
    flat = (ends.reshape(*ends.shape[:2], -1), patches.reshape(patches.shape[0], math.prod(sizes[1:]), -1))
    found = jnp.einsum("bop,bip->boi", *flat, precision=lax.Precision.HIGHEST)
    return found.reshape(-1, *sizes).transpose(0, *(1 + kernel_spec.index(axis) for axis in range(len(sizes))))


def _patches(inputs: Array, sizes: Sequence[int], positions: Sequence[int], parameters: Mapping[str, Any]) -> Array:
    """[b, channels, entries of the kernel, *positions]: what each entry meets at each position of the output."""
    # Slices, as a convolution with the identity takes ten times as long.
    strides, holes = parameters["window_strides"], parameters["rhs_dilation"]
    sides = zip(parameters["padding"], parameters["lhs_dilation"], strict=True)
    spread = [(low, high, dilation - 1) for (low, high), dilation in sides]
    padded = lax.pad(inputs, jnp.zeros((), inputs.dtype), [(0, 0, 0), (0, 0, 0), *spread])
    found = []
    for place in itertools.product(*map(range, sizes)):
        starts = [p * hole for p, hole in zip(place, holes, strict=True)]
        limits = [start + (m - 1) * stride + 1 for start, m, stride in zip(starts, positions, strides, strict=True)]
        found.append(lax.slice(padded, [0, 0, *starts], [*padded.shape[:2], *limits], [1, 1, *strides]))
    return jnp.stack(found, axis=2)


def _uses(jaxpr: Any, names: Sequence[str | None]) -> Iterator[tuple[str, Tap | None]]:
    marked = {v: name for v, name in zip(jaxpr.invars, names, strict=True) if name is not None}
    for equation in jaxpr.eqns:
        inside = [_name(marked, v) for v in equation.invars]
        if not any(inside):
            continue
        if equation.primitive.name in _OPENED:
            yield from _uses(_compat.inner_jaxpr(equation)[0], inside)  # type: ignore[index]
        else:
            yield from ((name, _tap(equation, place)) for place, name in enumerate(inside) if name)
    yield from ((name, None) for name in (_name(marked, v) for v in jaxpr.outvars) if name)


def _tap(equation: Any, operand: int) -> Tap | None:
    if equation.primitive.name == "conv_general_dilated":
        return _convolution_tap(equation, operand)
    if equation.primitive.name != "dot_general":
        return None
    matrix, vector = (equation.invars[i].aval for i in (operand, 1 - operand))
    contracting, batch = equation.params["dimension_numbers"]
    axes, met = contracting[operand], contracting[1 - operand]
    if matrix.ndim != 2 or len(axes) != 1 or batch[0] or math.prod(vector.shape) != vector.shape[met[0]]:
        return None
    out = equation.outvars[0].aval
    return Tap(operand, axes[0], out.shape, out.dtype)


def _convolution_tap(equation: Any, operand: int) -> Tap | None:
    parameters = equation.params
    inputs, kernel = (v.aval for v in equation.invars)
    grouped = parameters["feature_group_count"] * parameters["batch_group_count"] != 1
    if operand != 1 or grouped or inputs.shape[parameters["dimension_numbers"].lhs_spec[0]] != 1:
        return None
    out = equation.outvars[0].aval
    return Tap(operand, 0, out.shape, out.dtype, {**parameters, "kernel": kernel.shape})


def _name(marked: Mapping[Any, str], value: Any) -> str | None:
    return None if isinstance(value, _compat.Literal) else marked.get(value)


def _run(
    jaxpr: Any, consts: Sequence[Any], values: Sequence[Any], names: Sequence[str | None], visit: Callable[..., Any]
) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))
    marked = {v: name for v, name in zip(jaxpr.invars, names, strict=True) if name is not None}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, _compat.Literal) else env[v]

    for equation in jaxpr.eqns:
        operands = [read(v) for v in equation.invars]
        inside = [_name(marked, v) for v in equation.invars]
        if any(inside) and equation.primitive.name in _OPENED:
            inner, constants = _compat.inner_jaxpr(equation)  # type: ignore[misc]
            results: Sequence[Any] = _run(inner, constants, operands, inside, visit)
        elif any(inside):
            results = visit(next(name for name in inside if name), equation, operands)
        else:
            results = _compat.bind(equation, operands)
        env.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]
