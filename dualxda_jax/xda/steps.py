"""Operations with the same output and a modified gradient.

Between layers the cotangent c of a value a stands for the relevance a ⊙ c. In that form the plain gradient is already
right for ReLU, maximum, reshaping and every other operation with f(t·a) = t·f(a); the rest is here. Near the output
(and near the input, where the first layer asks for it) the cotangent is the relevance itself; `relevance_out` and
`relevance_in` say which of the two arrives and which is due.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax.types import Array
from dualxda_jax.xda import _compat, rules
from dualxda_jax.xda.clusters import Cluster
from dualxda_jax.xda.folding import Block, Link, bilinear, compose, onto_weights, weight_axes
from dualxda_jax.xda.graph import Atom, Equation, Value

Backward = Callable[[tuple[Array, ...], Any, Any], Sequence[Array | None]]


@dataclasses.dataclass(eq=False, frozen=True)
class Step:
    """One operation of the transformed function.

    Attributes:
        equation: what it stands for (the linear equation of a block).
        inputs: what it reads.
        outputs: what it computes.
        run: (values of the inputs, relevance_out, relevance_in) -> values of the outputs.
        rule: name of the rule, for people.
        takes: it can be handed relevance in place of c.
        gives: where it is handed relevance it hands relevance on.
        starts: it hands relevance on whatever it is handed: relevance may belong to an input of exactly zero, which c
            cannot say.
        block: the linear block, if it is one.
        plans: the plans of a loop's body or of the branches (see `walk`), for people.
        watched: (values of the inputs, watch, place) -> values of the outputs, of a loop that shows its rounds.
    """

    equation: Equation
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...]
    run: Callable[[Sequence[Any], bool, bool], tuple[Any, ...]]
    rule: str
    takes: bool = False
    gives: bool = False
    starts: bool = False
    block: Block | None = None
    plans: tuple[Any, ...] = ()
    watched: Callable[[Sequence[Any], Any, tuple[int, ...]], tuple[Any, ...]] | None = None


def modified(primal: Callable[..., Any], backward: Backward) -> Callable[..., Any]:
    """A function with another gradient: backward(inputs, output, cotangent) gives one per input, None for none."""
    fn: Any = jax.custom_vjp(primal)

    def forward(*inputs: Any) -> tuple[Any, Any]:
        output = primal(*inputs)
        return output, (inputs, output)

    def back(kept: Any, cotangent: Any) -> tuple[Array | None, ...]:
        inputs, output = kept
        return tuple(backward(inputs, output, cotangent))

    fn.defvjp(forward, back)
    return fn


def detach(value: Array) -> Array:
    """The value as a constant to the modified gradient; derivatives of the relevance itself still see it."""
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return value
    return modified(lambda v: v, lambda inputs, output, cotangent: (None,))(value)


def to_relevance(value: Array) -> Array:
    """Turn the c that arrives at a value into relevance."""
    return modified(lambda v: v, lambda inputs, output, c: (inputs[0] * c,))(value)


def from_relevance(value: Array) -> Array:
    """Turn the relevance that arrives at a value into c; relevance where the value is zero has no such form."""
    return modified(lambda v: v, lambda inputs, output, relevance: (_quotient(relevance, output),))(value)


def widen(value: Array) -> Array:
    """Float16 as float32: a quotient by a stabiliser of 1e-6 soon is infinite in the one; anything else as it is."""
    return value.astype(jnp.float32) if value.dtype == jnp.float16 else value


def fit(value: Array, dtype: jnp.dtype) -> Array:
    """The value in the given dtype; in float16 finite, since infinity at an input of zero would be NaN."""
    if dtype == jnp.float16:
        # An eighth leaves room for what other readers of the same value add.
        most = jnp.asarray(float(jnp.finfo(dtype).max) / 8, value.dtype)
        value = jnp.clip(value, -most, most)
    return value.astype(dtype)


def _quotient(relevance: Array, value: Array) -> Array:
    return fit(ratio(widen(relevance), widen(value)), relevance.dtype)


def ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 where the denominator is as good as 0."""
    tiny = jnp.asarray(float(jnp.finfo(denominator.dtype).tiny) ** 0.5, denominator.dtype)
    void = jnp.abs(denominator) < tiny
    return jnp.where(void, jnp.zeros((), numerator.dtype), numerator / jnp.where(void, tiny, denominator))


def _times_ratio(c: Array, output: Array, value: Array) -> Array:
    """What c of an output is as c of the value that it is a function of."""
    return fit(widen(c) * ratio(widen(output), widen(value)).astype(widen(c).dtype), c.dtype)


def native(equation: Equation, *, routes: bool = False, rule: str = "gradient") -> Step:
    """The operation as it is. `routes`: it only moves entries about, which suits relevance as well as c."""

    def run(values: Sequence[Any], relevance_out: bool, relevance_in: bool) -> tuple[Any, ...]:
        return _compat.bind(equation.source, values)

    return Step(equation, equation.inputs, equation.outputs, run, rule, takes=routes, gives=routes)


def elementwise(equation: Equation, live: int, *, homogeneous: bool, passes: bool) -> Step:
    """An entry-by-entry y = f(x): relevance passes unchanged, so that c is multiplied by y / x.

    Args:
        equation: the operation.
        live: position of x.
        homogeneous: f(t·x) = t·f(x) for t > 0, so that the plain gradient does just that.
        passes: whether relevance passes; if not, the plain gradient acts.
    """

    def primal(*values: Any) -> Any:
        return _compat.bind(equation.source, values)[0]

    def only(values: Sequence[Any], cotangent: Array) -> Sequence[Array | None]:
        return [cotangent if i == live else None for i in range(len(values))]

    pass_relevance = modified(primal, lambda inputs, output, relevance: only(inputs, relevance))
    scale_by_ratio = modified(primal, lambda inputs, output, c: only(inputs, _times_ratio(c, output, inputs[live])))
    give_relevance = modified(primal, lambda inputs, output, c: only(inputs, c * output))
    starts = passes and not homogeneous

    def run(values: Sequence[Any], relevance_out: bool, relevance_in: bool) -> tuple[Any, ...]:
        if relevance_out:
            return (pass_relevance(*values),)
        if starts:
            return ((give_relevance if relevance_in else scale_by_ratio)(*values),)
        return (primal(*values),)

    rule = "pass" if passes else "gradient"
    return Step(equation, equation.inputs, equation.outputs, run, rule, takes=passes, gives=passes, starts=starts)


def function(cluster: Cluster) -> Step:
    """An elementwise function in several equations: relevance passes to its one argument."""

    def primal(root: Array, *constants: Array) -> Array:
        env: dict[Atom, Any] = {cluster.root: root, **dict(zip(cluster.constants, constants, strict=True))}
        for equation in cluster.equations:
            env.update(
                zip(equation.outputs, _compat.bind(equation.source, [env[a] for a in equation.inputs]), strict=True)
            )
        return env[cluster.equations[-1].outputs[0]]

    pass_relevance = modified(primal, lambda inputs, output, relevance: (relevance, *(None for _ in inputs[1:])))
    scale = modified(
        primal,
        lambda inputs, output, c: (_times_ratio(c, output, inputs[0]), *(None for _ in inputs[1:])),
    )
    give_relevance = modified(primal, lambda inputs, output, c: (c * output, *(None for _ in inputs[1:])))

    def run(values: Sequence[Any], relevance_out: bool, relevance_in: bool) -> tuple[Any, ...]:
        fn = pass_relevance if relevance_out else give_relevance if relevance_in else scale
        return (fn(*values),)

    last, inputs = cluster.equations[-1], (cluster.root, *cluster.constants)
    return Step(last, inputs, last.outputs, run, "pass", takes=True, gives=True, starts=True)


def guided_relu(equation: Equation, live: int) -> Step:
    """ReLU that lets only positive cotangents back."""

    def primal(*values: Any) -> Any:
        return _compat.bind(equation.source, values)[0]

    def backward(inputs: tuple[Array, ...], output: Array, c: Array) -> Sequence[Array | None]:
        kept = jnp.where((output > 0) & (c > 0), c, jnp.zeros((), c.dtype))
        return [kept if i == live else None for i in range(len(inputs))]

    fn = modified(primal, backward)
    return Step(equation, equation.inputs, equation.outputs, lambda v, *_: (fn(*v),), "guided")


def sums(equation: Equation, stabilizer: float) -> Step:
    """A sum of data (skip connection, average pooling, sum by segment): every term in proportion to its share."""

    def primal(*values: Any) -> Any:
        return _compat.bind(equation.source, values)[0]

    def run(values: Sequence[Any], relevance_out: bool, relevance_in: bool) -> tuple[Any, ...]:
        def backward(inputs: tuple[Array, ...], output: Array, cotangent: Array) -> Sequence[Array | None]:
            relevance = widen(cotangent) if relevance_out else widen(cotangent) * widen(output)
            share = fit(relevance / rules.stabilize(widen(output), stabilizer), output.dtype)
            terms = [i for i, v in enumerate(inputs) if jnp.issubdtype(v.dtype, jnp.inexact)]

            def total(*found: Array) -> Array:
                rest = dict(zip(terms, found, strict=True))
                return primal(*(rest.get(i, v) for i, v in enumerate(inputs)))

            shares = dict(zip(terms, jax.linear_transpose(total, *(inputs[i] for i in terms))(share), strict=True))
            return [shares.get(i) for i in range(len(inputs))]

        return (modified(primal, backward)(*values),)

    return Step(equation, equation.inputs, equation.outputs, run, "share", takes=True)


def halves(equation: Equation) -> Step:
    """A product of two values that both depend on the data: half of the relevance to each factor."""

    def primal(*values: Any) -> Any:
        return _compat.bind(equation.source, values)[0]

    def backward(inputs: tuple[Array, ...], output: Array, c: Array) -> Sequence[Array | None]:
        _, transpose = jax.vjp(primal, *inputs)
        return [g * jnp.asarray(0.5, g.dtype) for g in transpose(c)]

    fn = modified(primal, backward)
    return Step(equation, equation.inputs, equation.outputs, lambda v, *_: (fn(*v),), "half each")


def linear(block: Block, rule: rules.Rule, *, nonnegative: bool) -> Step:
    """A linear block under a rule."""
    count = len([k for k in block.before if k.operand is not None])

    def run(values: Sequence[Any], relevance_out: bool, relevance_in: bool) -> tuple[Any, ...]:
        def forward(a: Array, w: Array, *operands: Array) -> tuple[Array, Any]:
            before = _apply_chain(block.before, a, operands[:count])
            pair = (before, w) if block.live == 0 else (w, before)
            (product,) = _compat.bind(block.equation.source, pair)
            y = _apply_chain(block.after, product, operands[count:])
            return y, (a, w, operands, product, y)

        def backward(kept: Any, cotangent: Array) -> tuple[Array | None, ...]:
            a, w, operands, product, y = kept
            operation = _operation(block, a, w, operands[:count], operands[count:], product, y, rule, nonnegative)
            relevance = cotangent.astype(operation.z.dtype)
            if not relevance_out:
                relevance = relevance * operation.y
            result = rules.propagate(rule, operation, relevance)
            if relevance_in and not isinstance(rule, rules.FIRST_LAYER_ONLY):
                result = result * operation.a
            return (fit(result, a.dtype), None, *(None for _ in operands))

        fn: Any = jax.custom_vjp(lambda *values: forward(*values)[0])
        fn.defvjp(forward, backward)
        return (fn(*values),)

    inputs = (block.input, block.weights, *block.operands)
    return Step(block.equation, inputs, (block.output,), run, str(rule), takes=True, block=block)


def _apply_chain(chain: Sequence[Link], value: Array, operands: Sequence[Array]) -> Array:
    rest = iter(operands)
    for link in chain:
        values = [value] if link.operand is None else [value, next(rest)]
        (value,) = _compat.bind(link.equation.source, values if link.live == 0 else values[::-1])
    return value


def _operation(
    block: Block,
    a: Array,
    w: Array,
    operands_before: Sequence[Array],
    operands_after: Sequence[Array],
    product: Array,
    y: Array,
    rule: rules.Rule,
    nonnegative: bool,
) -> rules.Operation:
    """What the rule sees: one linear operation, in at least float32."""
    dtype = y.dtype if y.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    a, w, y = a.astype(dtype), w.astype(dtype), y.astype(dtype)
    before = compose(block.before, operands_before, dtype)
    after = compose(block.after, operands_after, dtype)
    apply = bilinear(block.equation, block.live)
    if after.scale is not None:
        w = w * onto_weights(after.scale, weight_axes(block.equation, block.live, "output"), w.ndim)
    bias = None if after.shift is None else jnp.broadcast_to(after.shift, y.shape)
    if before.shift is not None:
        shifted = apply(jnp.broadcast_to(before.shift, a.shape), w)
        bias = shifted if bias is None else bias + shifted
    if before.scale is not None:
        w = w * onto_weights(before.scale, weight_axes(block.equation, block.live, "input"), w.ndim)
    if before.shift is None and product.dtype == dtype and _compat.exact_products(block.equation.source):
        z = product if after.scale is None else product * after.scale
    else:
        z = apply(a, w)
    if bias is None or getattr(rule, "zero_bias", True):
        return rules.Operation(apply, a, w, None, z, y, nonnegative)
    return rules.Operation(apply, a, w, bias, z + bias, y, nonnegative)
