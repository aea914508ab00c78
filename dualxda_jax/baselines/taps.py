"""Where a parameter enters a function as the matrix of a linear operation, and what meets it there.

The gradient of one sample with respect to a weight matrix is an outer product of the layer's input and of the loss's
gradient at the layer's output. Both are small; the product is not. So the function of one sample is traced, a matrix
that is used once, in one product with one vector, is found in its equations, and the function is run with a zero added
to that product's result: the derivative with respect to the zero is the one factor, the vector is the other.

The kernel of a convolution that is used once is found in the same way; its gradient is a product of patches and
derivatives for each sample. vmap would make a grouped convolution of it, which is no faster, and which XLA gets wrong
where the samples are sharded (jaxlib 0.10.2, CPU). For that reason all other convolutions, whose kernels are used
twice, are cast or scaled before, or lie in a loop or a branch, are run with such a derivative too.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
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

    def visit(inside: Sequence[str], equation: Any, operands: Sequence[Any]) -> tuple[Any, ...]:
        name = next((name for name in inside if name in taps), None)
        if name is None:
            return _bind(equation, operands)
        results = _compat.bind(equation, operands)
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
    return _kernel_gradient(tap.convolution, met, ends)


def _kernel_gradient(parameters: Mapping[str, Any], inputs: Array, ends: Array) -> Array:
    """[b, *shape of the kernel] from inputs and derivatives of the results of b convolutions."""
    inputs_spec, kernel_spec, out_spec = parameters["dimension_numbers"]
    # [b, batch of the convolution, channels, positions...].
    inputs, ends = (
        a.transpose(0, *(1 + axis for axis in spec)) for a, spec in ((inputs, inputs_spec), (ends, out_spec))
    )
    sizes, groups = [parameters["kernel"][axis] for axis in kernel_spec], parameters["feature_group_count"]
    patches = _patches(inputs.reshape(-1, *inputs.shape[2:]), sizes[2:], ends.shape[3:], parameters)
    # [b, batch, groups, what meets the group's kernels, positions] and [b, batch, groups, its outputs, positions].
    patches = patches.reshape(*inputs.shape[:2], groups, math.prod(sizes[1:]), -1).astype(ends.dtype)
    ends = ends.reshape(*ends.shape[:2], groups, sizes[0] // groups, -1)
    found = jnp.einsum("bngop,bngip->bgoi", ends, patches, precision=lax.Precision.HIGHEST)
    return found.reshape(-1, *sizes).transpose(0, *(1 + kernel_spec.index(axis) for axis in range(len(sizes))))


def _convolve(equation: Any, inputs: Array, kernel: Array) -> Array:
    """The convolution of an equation, the derivative by the kernel taken as that of a tapped one."""
    parameters = {**equation.params, "kernel": kernel.shape}

    @jax.custom_vjp
    def run(inputs: Array, kernel: Array) -> Array:
        return _compat.bind(equation, (inputs, kernel))[0]

    def backward(kept: tuple[Array, Array], ends: Array) -> tuple[Array, Array]:
        inputs, kernel = kept
        (of_inputs,) = jax.vjp(lambda inputs: _compat.bind(equation, (inputs, kernel))[0], inputs)[1](ends)
        return of_inputs, _kernel_gradient(parameters, inputs[None], ends[None])[0].astype(kernel.dtype)

    run.defvjp(lambda inputs, kernel: (run(inputs, kernel), (inputs, kernel)), backward)
    return run(inputs, kernel)


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
            alone = sum(name is not None for name in inside) == 1
            yield from ((name, _tap(equation, place) if alone else None) for place, name in enumerate(inside) if name)
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
    if operand != 1 or parameters["batch_group_count"] != 1:
        return None
    out = equation.outvars[0].aval
    return Tap(operand, 0, out.shape, out.dtype, {**parameters, "kernel": equation.invars[1].aval.shape})


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
        opened = equation.primitive.name in _OPENED
        if opened and (any(inside) or _convolves(equation)):
            inner, constants = _compat.inner_jaxpr(equation)  # type: ignore[misc]
            results: Sequence[Any] = _run(inner, constants, operands, inside, visit)
        elif _convolves(equation) and _compat.bodies(equation):
            functions = [functools.partial(_run_body, body) for body in _compat.bodies(equation)]
            results = _compat.rebind_bodies(equation, functions, operands)
        else:
            results = visit([name for name in inside if name], equation, operands)
        env.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _run_body(closed: Any, *values: Any) -> list[Any]:
    """What a loop's body or a branch computes; no parameter is looked for in it."""
    names = [None] * len(values)
    return _run(closed.jaxpr, closed.consts, values, names, lambda inside, equation, v: _bind(equation, v))


def _bind(equation: Any, operands: Sequence[Any]) -> tuple[Any, ...]:
    if equation.primitive.name == "conv_general_dilated" and equation.params["batch_group_count"] == 1:
        return (_convolve(equation, *operands),)
    return _compat.bind(equation, operands)


def _convolves(equation: Any) -> bool:
    """Whether there is a convolution in a call, a loop or a branch."""
    name = equation.primitive.name
    inner = _compat.inner_jaxpr(equation) if name in _OPENED else None
    within = [inner[0]] if inner is not None else [b.jaxpr for b in _compat.bodies(equation) if name != "shard_map"]
    return any(e.primitive.name == "conv_general_dilated" or _convolves(e) for jaxpr in within for e in jaxpr.eqns)
