"""The rules of layer-wise relevance propagation for one linear operation z = W·a + b.

A rule gets the relevance R of the output and gives the relevance of the input. Most rules have the form a ⊙ c and give
the modified gradient c, which is what composes with automatic differentiation; flat, w² and z-box put relevance where
a = 0 and therefore give the relevance itself.

Source: Bach et al. 2015 (ε, αβ); Montavon et al. 2017 (z⁺, w², z-box); Montavon et al. 2019 and Andéol et al. 2021
(γ, also for negative inputs); Lapuschkin et al. 2019 (flat).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.types import Array


def check_number(argument: str, value: Any) -> None:
    """Check that a constant of a rule is a finite Python or NumPy number, which hashes, and not negative."""
    if not (_check.is_real(value) and value >= 0):
        _check.fail(argument, repr(value), "a number, finite and not negative")


def check_flag(argument: str, value: Any) -> None:
    """Check that something is either True or False."""
    if not isinstance(value, bool | np.bool_):
        _check.fail(argument, repr(value), "True or False")


class _Checked:
    """A rule whose fields are numbers and flags."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # the subclasses are dataclasses
            if field.name not in ("low", "high"):
                check = check_flag if field.name == "zero_bias" else check_number
                check(field.name, getattr(self, field.name))


@dataclasses.dataclass(frozen=True)
class Epsilon(_Checked):
    """ε-rule: every contribution in proportion to its share of z."""

    epsilon: float = 1e-6
    zero_bias: bool = True


@dataclasses.dataclass(frozen=True)
class ZPlus(_Checked):
    """z⁺-rule: only the positive contributions."""

    stabilizer: float = 1e-6
    zero_bias: bool = True


@dataclasses.dataclass(frozen=True)
class AlphaBeta(_Checked):
    """αβ-rule: α times the positive less β times the negative contributions; α - β must be 1."""

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 1e-6
    zero_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.alpha - self.beta - 1) > 1e-9:
            _check.fail("alpha, beta", (self.alpha, self.beta), "non-negative with alpha - beta = 1")


@dataclasses.dataclass(frozen=True)
class Gamma(_Checked):
    """γ-rule: contributions of the output's sign are favoured by the factor 1 + γ."""

    gamma: float = 0.25
    stabilizer: float = 1e-6
    zero_bias: bool = True


@dataclasses.dataclass(frozen=True)
class ZBox(_Checked):
    """z-box rule for inputs known to lie in [low, high]; a tuple holds one bound for each entry of the last axis."""

    low: float | tuple[float, ...]
    high: float | tuple[float, ...]
    stabilizer: float = 1e-6
    zero_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for argument, bound in (("low", self.low), ("high", self.high)):
            each = bound if isinstance(bound, tuple) else (bound,)
            if not each or not all(map(_check.is_real, each)):
                _check.fail(argument, repr(bound), "a finite number, or a tuple of them")


@dataclasses.dataclass(frozen=True)
class WSquare(_Checked):
    """w²-rule: in proportion to the squared weights, whatever the input."""

    stabilizer: float = 1e-6
    zero_bias: bool = True


@dataclasses.dataclass(frozen=True)
class Flat(_Checked):
    """Flat rule: spread evenly over the receptive field."""

    stabilizer: float = 1e-6


Rule = Epsilon | ZPlus | AlphaBeta | Gamma | ZBox | WSquare | Flat

FIRST_LAYER_ONLY = (ZBox, WSquare, Flat)
"""Rules that have no form a ⊙ c: they give the relevance itself."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """A linear operation at its operating point.

    Attributes:
        apply: (a, w) -> the product, bilinear.
        a: the input.
        w: the weights, with every merged scale.
        bias: what is added to the product, or None.
        z: apply(a, w) + bias.
        y: the layer's true output, bias included whatever the rule does with it.
        nonnegative: the input is known to have no negative entry, so half of the sign-split products can be left out.
    """

    apply: Callable[[Array, Array], Array]
    a: Array
    w: Array
    bias: Array | None
    z: Array
    y: Array
    nonnegative: bool = False

    def transpose(self, w: Array, s: Array) -> Array:
        """Wᵀs."""
        (result,) = jax.linear_transpose(lambda a: self.apply(a, w), self.a)(s)
        return result


def stabilize(z: Array, epsilon: float) -> Array:
    """Move z away from zero by epsilon in the direction of its sign, with sign(0) = +1."""
    if epsilon == 0:
        # Nothing contributed to an output of exactly zero, so nothing is handed on: dividing by inf says so.
        return jnp.where(z == 0, jnp.asarray(jnp.inf, z.dtype), z)
    return z + jnp.where(z >= 0, jnp.asarray(epsilon, z.dtype), jnp.asarray(-epsilon, z.dtype))


def propagate(rule: Rule, operation: Operation, relevance: Array) -> Array:
    """Apply a rule.

    Args:
        rule: which.
        operation: the linear operation at its operating point.
        relevance: relevance of the output, shaped like z.

    Returns:
        Array like a: c with relevance a ⊙ c, or the relevance itself for the rules in `FIRST_LAYER_ONLY`.
    """
    return _FUNCTIONS[type(rule)](rule, operation, relevance)


def _positive(x: Array) -> Array:
    return jnp.maximum(x, jnp.zeros((), x.dtype))


def _negative(x: Array) -> Array:
    return jnp.minimum(x, jnp.zeros((), x.dtype))


def _plus(z: Array, bias: Array | None) -> Array:
    return z if bias is None else z + bias


def _part(bias: Array | None, part: Callable[[Array], Array]) -> Array | None:
    return None if bias is None else part(bias)


def _split_sum(op: Operation, with_positive: Array, with_negative: Array, bias: Array | None) -> Array:
    """a⁺·(weights met by positive inputs) + a⁻·(weights met by negative ones) + bias."""
    if op.nonnegative:
        return _plus(op.apply(op.a, with_positive), bias)
    both = op.apply(_positive(op.a), with_positive) + op.apply(_negative(op.a), with_negative)
    return _plus(both, bias)


def _by_sign(op: Operation, for_positive: Callable[[], Array], for_negative: Callable[[], Array]) -> Array:
    """The c of a rule that treats positive and negative inputs apart."""
    if op.nonnegative:
        return for_positive()
    return jnp.where(op.a > 0, for_positive(), for_negative())


def _epsilon(rule: Epsilon, op: Operation, relevance: Array) -> Array:
    return op.transpose(op.w, relevance / stabilize(op.z, rule.epsilon))


def _zplus(rule: ZPlus, op: Operation, relevance: Array) -> Array:
    wp, wn = _positive(op.w), _negative(op.w)
    s = relevance / stabilize(_split_sum(op, wp, wn, _part(op.bias, _positive)), rule.stabilizer)
    return _by_sign(op, lambda: op.transpose(wp, s), lambda: op.transpose(wn, s))


def _alpha_beta(rule: AlphaBeta, op: Operation, relevance: Array) -> Array:
    wp, wn = _positive(op.w), _negative(op.w)
    sa = rule.alpha * relevance / stabilize(_split_sum(op, wp, wn, _part(op.bias, _positive)), rule.stabilizer)
    sb = rule.beta * relevance / stabilize(_split_sum(op, wn, wp, _part(op.bias, _negative)), rule.stabilizer)
    return _by_sign(
        op,
        lambda: op.transpose(wp, sa) - op.transpose(wn, sb),
        lambda: op.transpose(wn, sa) - op.transpose(wp, sb),
    )


def _gamma(rule: Gamma, op: Operation, relevance: Array) -> Array:
    wp, wn = op.w + rule.gamma * _positive(op.w), op.w + rule.gamma * _negative(op.w)
    bp = None if op.bias is None else op.bias + rule.gamma * _positive(op.bias)
    bn = None if op.bias is None else op.bias + rule.gamma * _negative(op.bias)
    nothing = jnp.zeros((), relevance.dtype)
    # The two cases exclude each other output by output, so one division serves both.
    up = op.y > 0
    z = jnp.where(up, _split_sum(op, wp, wn, bp), _split_sum(op, wn, wp, bn))
    s = relevance / stabilize(z, rule.stabilizer)
    sp, sn = jnp.where(up, s, nothing), jnp.where(op.y < 0, s, nothing)
    return _by_sign(
        op,
        lambda: op.transpose(wp, sp) + op.transpose(wn, sn),
        lambda: op.transpose(wn, sp) + op.transpose(wp, sn),
    )


def _bound(value: float | tuple[float, ...], a: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(np.asarray(value), a.dtype).reshape((1,) * (a.ndim - 1) + (-1,)), a.shape)


def _zbox(rule: ZBox, op: Operation, relevance: Array) -> Array:
    low, high = _bound(rule.low, op.a), _bound(rule.high, op.a)
    wp, wn = _positive(op.w), _negative(op.w)
    below = _plus(op.apply(low, wp), _part(op.bias, _positive))
    above = _plus(op.apply(high, wn), _part(op.bias, _negative))
    s = relevance / stabilize(op.z - below - above, rule.stabilizer)
    return op.a * op.transpose(op.w, s) - low * op.transpose(wp, s) - high * op.transpose(wn, s)


def _wsquare(rule: WSquare, op: Operation, relevance: Array) -> Array:
    w = op.w * op.w
    z = _plus(op.apply(jnp.ones_like(op.a), w), _part(op.bias, jnp.square))
    return op.transpose(w, relevance / stabilize(z, rule.stabilizer))


def _flat(rule: Flat, op: Operation, relevance: Array) -> Array:
    w = jnp.ones_like(op.w)
    z = op.apply(jnp.ones_like(op.a), w)
    return op.transpose(w, relevance / stabilize(z, rule.stabilizer))


_FUNCTIONS: dict[type, Callable[..., Array]] = {
    Epsilon: _epsilon,
    ZPlus: _zplus,
    AlphaBeta: _alpha_beta,
    Gamma: _gamma,
    ZBox: _zbox,
    WSquare: _wsquare,
    Flat: _flat,
}
