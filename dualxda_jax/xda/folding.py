"""Linear blocks: a convolution or dense product with the scales and shifts around it merged in.

A bias is a shift that follows; BatchNorm in evaluation mode is a shift, a scale and a shift, before or after. All of
them together are again one linear operation W'·a + b', and that is what a rule has to see.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from dualxda_jax.types import Array
from dualxda_jax.xda.graph import Atom, Constant, Equation, Graph, Value

LINEAR = frozenset(["conv_general_dilated", "dot_general"])
AFFINE = frozenset(["add", "sub", "mul", "div", "neg", "convert_element_type", "copy", "copy_p", "add_any"])
_ELEMENTWISE = AFFINE | {"max", "min", "sqrt", "rsqrt", "integer_pow", "square", "exp", "tanh", "logistic"}


@dataclasses.dataclass(frozen=True)
class Link:
    """One affine equation in a chain; `live` is the position of the chain's operand in it."""

    equation: Equation
    live: int

    @property
    def operand(self) -> Atom | None:
        """The other operand, None for a unary equation."""
        inputs = self.equation.inputs
        return inputs[1 - self.live] if len(inputs) == 2 else None


@dataclasses.dataclass(eq=False, frozen=True)
class Block:
    """A linear equation with what is merged into it.

    Attributes:
        equation: the convolution or product.
        live: which of its operands depends on the data; the other one is the weights.
        before: chain from the block's input to the equation's.
        after: chain from the equation's output to the block's.
    """

    equation: Equation
    live: int
    before: tuple[Link, ...]
    after: tuple[Link, ...]

    @property
    def input(self) -> Atom:
        first = self.before[0] if self.before else Link(self.equation, self.live)
        return first.equation.inputs[first.live]

    @property
    def output(self) -> Value:
        return (self.after[-1].equation if self.after else self.equation).outputs[0]

    @property
    def weights(self) -> Atom:
        return self.equation.inputs[1 - self.live]

    @property
    def operands(self) -> tuple[Atom, ...]:
        """The parameters that the merged equations read, one for each binary link."""
        return tuple(k.operand for k in (*self.before, *self.after) if k.operand is not None)

    @property
    def is_convolution(self) -> bool:
        return self.equation.name == "conv_general_dilated"


def blocks(graph: Graph) -> list[Block]:
    """Every linear block of a graph, in the order of execution."""
    found = []
    merged: set[Equation] = set()
    for equation in graph.equations:
        live = [graph.is_live(a) for a in equation.inputs]
        if equation.name not in LINEAR or sum(live) != 1 or not graph.is_fixed(equation.inputs[1 - live.index(True)]):
            continue
        position = live.index(True)
        after = _follow(graph, equation, position)
        merged.update(link.equation for link in after)
        found.append(Block(equation, position, _precede(graph, equation, position, merged), after))
    return found


def _link(graph: Graph, equation: Equation, value: Value) -> Link | None:
    """The equation as a link of the chain through `value`, or None where it is not affine in it."""
    if equation.name not in AFFINE or sum(a is value for a in equation.inputs) != 1:
        return None
    link = Link(equation, next(i for i, a in enumerate(equation.inputs) if a is value))
    if equation.outputs[0].aval.shape != value.aval.shape or equation.outputs[0] not in graph.live:
        return None
    if link.operand is not None and not graph.is_fixed(link.operand):
        return None
    if equation.name == "div" and link.live == 1:
        return None
    return link


def _scales(link: Link) -> bool:
    return link.equation.name in ("mul", "div")


def _follow(graph: Graph, equation: Equation, live: int) -> tuple[Link, ...]:
    chain: list[Link] = []
    value = equation.outputs[0]
    channels = frozenset(weight_axes(equation, live, "output").values())
    while len(graph.users.get(value, ())) == 1 and value not in graph.outputs:
        link = _link(graph, graph.users[value][0], value)
        if link is None or (_scales(link) and not varying(graph, link.operand) <= channels):
            break
        chain.append(link)
        value = link.equation.outputs[0]
    return tuple(chain)


def _precede(graph: Graph, equation: Equation, live: int, merged: set[Equation]) -> tuple[Link, ...]:
    chain: list[Link] = []
    value = equation.inputs[live]
    channels = frozenset(weight_axes(equation, live, "input").values())
    while isinstance(value, Value) and value in graph.producer:
        before = graph.producer[value]
        live_inputs = [a for a in before.inputs if graph.is_live(a)]
        if before in merged or before.name not in AFFINE or len(live_inputs) != 1:
            break
        link = _link(graph, before, live_inputs[0])
        if link is None or (_scales(link) and not varying(graph, link.operand) <= channels):
            break
        chain.append(link)
        value = live_inputs[0]
    # A lone change of dtype is no scale; leaving it out keeps the block's input what the layer's input is.
    while chain and chain[-1].equation.name in ("convert_element_type", "copy", "copy_p"):
        chain.pop()
    return tuple(chain[::-1])


def weight_axes(equation: Equation, live: int, side: str) -> dict[int, int]:
    """Which axis of the weights runs along which axis of the equation's data input or output.

    Args:
        equation: a linear equation.
        live: the position of its data operand.
        side: "input" or "output".

    Returns:
        {axis of the weights: axis of the input or output}; a scale that varies along no other axis can be merged.
    """
    if equation.name == "conv_general_dilated":
        numbers = equation.params["dimension_numbers"]
        if live != 0 or equation.params["batch_group_count"] != 1:
            return {}
        if side == "output":
            return {numbers.rhs_spec[0]: numbers.out_spec[1]}
        # With groups one slice of the weights meets several input channels: no single factor would do.
        return {numbers.rhs_spec[1]: numbers.lhs_spec[1]} if equation.params["feature_group_count"] == 1 else {}
    contract, batch = equation.params["dimension_numbers"]
    weight_contract, weight_batch = contract[1 - live], batch[1 - live]
    if side == "input":
        return dict(zip((*weight_contract, *weight_batch), (*contract[live], *batch[live]), strict=True))
    ndim = equation.inputs[1 - live].aval.ndim
    free = [i for i in range(ndim) if i not in weight_contract and i not in weight_batch]
    live_free = equation.inputs[live].aval.ndim - len(contract[live]) - len(batch[live])
    start = len(weight_batch) + (live_free if live == 0 else 0)
    axes = {axis: start + i for i, axis in enumerate(free)}
    return axes | {axis: i for i, axis in enumerate(weight_batch)}


def varying(graph: Graph, atom: Atom | None) -> frozenset[int]:
    """The axes along which a parameter can differ; a broadcast one is the same along the others."""
    if atom is None:
        return frozenset()
    shape = atom.aval.shape
    wide = frozenset(i for i, size in enumerate(shape) if size > 1)
    if isinstance(atom, Constant) or atom not in graph.producer:
        return wide
    equation = graph.producer[atom]
    if equation.name == "broadcast_in_dim":
        inner = varying(graph, equation.inputs[0])
        axes = equation.params["broadcast_dimensions"]
        return wide & frozenset(axes[i] for i in inner if i < len(axes))
    if equation.name in _ELEMENTWISE and all(a.aval.shape in ((), shape) for a in equation.inputs):
        return wide & frozenset().union(*(varying(graph, a) for a in equation.inputs))
    return wide


@dataclasses.dataclass(frozen=True)
class Affine:
    """v -> scale · v + shift; None stands for 1 and 0."""

    scale: Array | None = None
    shift: Array | None = None


def compose(chain: Sequence[Link], operands: Sequence[Array], dtype: jnp.dtype) -> Affine:
    """The affine map that a chain computes, in the given dtype; `operands` are those of its binary links."""
    scale: Array | None = None
    shift: Array | None = None
    rest = iter(operands)

    def times(v: Array | None, factor: Array) -> Array:
        return factor if v is None else v * factor

    for link in chain:
        name = link.equation.name
        operand = next(rest).astype(dtype) if link.operand is not None else jnp.ones((), dtype)
        if name in ("add", "add_any", "sub"):
            if name == "sub" and link.live == 1:
                scale, shift = times(scale, -jnp.ones((), dtype)), None if shift is None else -shift
            elif name == "sub":
                operand = -operand
            shift = operand if shift is None else shift + operand
        elif name in ("mul", "div", "neg"):
            factor = 1 / operand if name == "div" else -operand if name == "neg" else operand
            scale, shift = times(scale, factor), None if shift is None else shift * factor
    return Affine(scale, shift)


def onto_weights(scale: Array, axes: dict[int, int], ndim: int) -> Array:
    """Lay a scale of the data side along the weights' axes (see `weight_axes`), ready to multiply."""
    if scale.ndim == 0:
        return scale
    for axis in range(scale.ndim):
        if axis not in axes.values():
            scale = lax.slice_in_dim(scale, 0, 1, axis=axis)
    order = [axes[i] for i in sorted(axes)]
    scale = jnp.transpose(scale, [*order, *(i for i in range(scale.ndim) if i not in order)])
    scale = scale.reshape(scale.shape[: len(order)])
    return jnp.expand_dims(scale, [i for i in range(ndim) if i not in axes])


def bilinear(equation: Equation, live: int) -> Callable[[Array, Array], Array]:
    """(a, w) -> their product by this equation, in the highest precision: a ratio of sums forgives no rounding."""
    p = equation.params
    highest = lax.Precision.HIGHEST
    if equation.name == "dot_general":

        def dot(a: Array, w: Array) -> Array:
            left, right = (a, w) if live == 0 else (w, a)
            return lax.dot_general(left, right, p["dimension_numbers"], precision=highest)

        return dot

    def convolve(a: Array, w: Array) -> Array:
        return lax.conv_general_dilated(
            a,
            w,
            window_strides=p["window_strides"],
            padding=p["padding"],
            lhs_dilation=p["lhs_dilation"],
            rhs_dilation=p["rhs_dilation"],
            dimension_numbers=p["dimension_numbers"],
            feature_group_count=p["feature_group_count"],
            batch_group_count=p["batch_group_count"],
            precision=highest,
        )

    return convolve
