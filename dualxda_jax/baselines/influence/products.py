"""The trace of a function as equations, and the products of kernels with data in it, seen as z_t = Wᵀ a_t."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax.types import Array, Params
from dualxda_jax.xda import _compat

_INLINED = frozenset(["jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"])


@dataclasses.dataclass(eq=False, frozen=True)
class Atom:
    """A value of the trace, compared by identity; `literal` if it is a number written into the trace."""

    aval: Any
    literal: Any = None


@dataclasses.dataclass(eq=False, frozen=True)
class Equation:
    """One primitive applied to atoms."""

    source: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[Atom, ...]

    @property
    def name(self) -> str:
        return self.source.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.source.params


@dataclasses.dataclass(eq=False, frozen=True)
class Trace:
    """A function of (parameters, one input) as equations in order of execution; call-like primitives are inlined.

    Attributes:
        equations: in order.
        leaves: of the parameters.
        data: the input.
        constants: values that the function closed over.
        output: the logits [k].
    """

    equations: tuple[Equation, ...]
    leaves: tuple[Atom, ...]
    data: Atom
    constants: dict[Atom, Any]
    output: Atom


def trace(logits: Callable[[Params, Array], Array], params: Params, x: Any) -> Trace:
    """Trace logits(params, x[None])[0]; only the shapes of the arguments matter."""
    values, treedef = jax.tree.flatten(params)
    closed, _ = _compat.trace(
        lambda leaves, x: logits(jax.tree.unflatten(treedef, leaves), x[None])[0],
        [jax.ShapeDtypeStruct(jnp.shape(v), jnp.result_type(v)) for v in values],
        jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)),
    )
    arguments = [Atom(v.aval) for v in closed.jaxpr.invars]
    constants: dict[Atom, Any] = {}
    equations: list[Equation] = []
    (output,) = _inline(closed.jaxpr, closed.consts, arguments, constants, equations)
    return Trace(tuple(equations), tuple(arguments[:-1]), arguments[-1], constants, output)


def _inline(
    jaxpr: Any,
    constant_values: Sequence[Any],
    arguments: Sequence[Atom],
    constants: dict[Atom, Any],
    equations: list[Equation],
) -> list[Atom]:
    """Append the equations in order; functions with a custom derivative stay whole, since it would be lost."""
    env: dict[Any, Atom] = {}
    for variable, value in zip(jaxpr.constvars, constant_values, strict=True):
        env[variable] = Atom(variable.aval)
        constants[env[variable]] = value
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def read(v: Any) -> Atom:
        return Atom(v.aval, v.val) if isinstance(v, _compat.Literal) else env[v]

    for source in jaxpr.eqns:
        inputs = tuple(read(v) for v in source.invars)
        inner = _compat.inner_jaxpr(source) if source.primitive.name in _INLINED else None
        if inner is None:
            outputs = [Atom(v.aval) for v in source.outvars]
            equations.append(Equation(source, inputs, tuple(outputs)))
        else:
            outputs = _inline(inner[0], inner[1], inputs, constants, equations)
        env.update(zip(source.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def is_product(equation: Equation, side: int) -> bool:
    """Whether the operand at `side` is the kernel of a plain product: no groups, no batch dimensions."""
    if equation.name == "dot_general":
        return not equation.params["dimension_numbers"][1][0]
    if equation.name == "conv_general_dilated":
        return side == 1 and equation.params["feature_group_count"] == equation.params["batch_group_count"] == 1
    return False


def kernel_matrix(kernel: Any, equation: Equation, side: int) -> Any:
    """The kernel, an array as the equation reads it, as W [inputs, outputs]."""
    if equation.name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][side]
        free = [i for i in range(kernel.ndim) if i not in contracted]
        size = math.prod(kernel.shape[i] for i in contracted)
        return kernel.transpose([*contracted, *free]).reshape(size, -1)
    outputs, inputs, *spatial = equation.params["dimension_numbers"].rhs_spec
    return kernel.transpose([*spatial, inputs, outputs]).reshape(-1, kernel.shape[outputs])


def output_rows(output: Any, equation: Equation, side: int) -> Any:
    """The product, an array like the equation's output (or more axes in front), as z [..., t, outputs]."""
    shape = equation.outputs[0].aval.shape
    more = output.ndim - len(shape)
    if equation.name == "dot_general":
        free = len(equation.inputs[side].aval.shape) - len(equation.params["dimension_numbers"][0][side])
        rest = len(shape) - free
        order = [*range(rest), *range(rest, len(shape))] if side == 1 else [*range(free, len(shape)), *range(free)]
        size = math.prod(shape[i] for i in order[rest:])
    else:
        batch, feature, *spatial = equation.params["dimension_numbers"].out_spec
        order, size = [batch, *spatial, feature], shape[feature]
    moved = output.transpose([*range(more), *(more + i for i in order)])
    return moved.reshape(*output.shape[:more], -1, size)


def input_rows(data: Array, equation: Equation, side: int) -> Array:
    """The data that meet the kernel as a [t, inputs]: rows of a matrix, or the patches under the kernel."""
    if equation.name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][1 - side]
        free = [i for i in range(data.ndim) if i not in contracted]
        size = math.prod(data.shape[i] for i in contracted)
        return data.transpose([*free, *contracted]).reshape(-1, size)
    return _patches(data, equation)


def _patches(data: Array, equation: Equation) -> Array:
    """Rows (batch, position) and columns (place in the kernel, channel), by slices: exact, and no convolution."""
    params, numbers = equation.params, equation.params["dimension_numbers"]
    data = data.transpose([numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]])
    spatial = [equation.inputs[1].aval.shape[i] for i in numbers.rhs_spec[2:]]
    sizes = [equation.outputs[0].aval.shape[i] for i in numbers.out_spec[2:]]
    widths = [(low, high, gap - 1) for (low, high), gap in zip(params["padding"], params["lhs_dilation"], strict=True)]
    padded = jax.lax.pad(data, jnp.zeros((), data.dtype), [(0, 0, 0), *widths, (0, 0, 0)])
    pieces = []
    for place in itertools.product(*(range(s) for s in spatial)):
        start = [p * gap for p, gap in zip(place, params["rhs_dilation"], strict=True)]
        stop = [s + (size - 1) * step + 1 for s, size, step in zip(start, sizes, params["window_strides"], strict=True)]
        pieces.append(
            jax.lax.slice(
                padded,
                (0, *start, 0),
                (data.shape[0], *stop, data.shape[-1]),
                (1, *params["window_strides"], 1),
            )
        )
    return jnp.concatenate(pieces, axis=-1).reshape(-1, len(pieces) * data.shape[-1])


def relayout(equation: Equation, array: np.ndarray) -> np.ndarray | None:
    """An operation that only moves entries about, on NumPy; None for any other."""
    shape = tuple(equation.outputs[0].aval.shape)
    if len(equation.inputs) != 1:
        return None
    if equation.name == "transpose":
        return array.transpose(equation.params["permutation"])
    if equation.name == "broadcast_in_dim":
        expanded = [1] * len(shape)
        for size, axis in zip(array.shape, equation.params["broadcast_dimensions"], strict=True):
            expanded[axis] = size
        return np.broadcast_to(array.reshape(expanded), shape)
    if equation.name in ("reshape", "squeeze", "expand_dims", "convert_element_type", "copy"):
        return array.reshape(shape)
    return None
