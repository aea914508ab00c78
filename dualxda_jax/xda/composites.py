"""Composites: which rule goes to which kind of layer. Plain data: frozen, hashable, printable.

Every factory takes

    zero_bias: leave biases out of the denominators, so that a map sums to what it started from; False keeps them, and
        they absorb their share of the relevance.
    epsilon: the ε of the ε-rule.
    stabilizer: what keeps every other division away from zero.

Anything else is a `dataclasses.replace` away, as in
`replace(epsilon_plus(), overrides=(("layer1/*", rules.Gamma(0.1)),))`.

Source: the composites of Anders et al. 2021 (zennit), whose conventions these follow.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dualxda_jax import _check
from dualxda_jax.xda import rules
from dualxda_jax.xda.rules import Rule

_KNOWN = {
    "activation": ("pass", "gradient", "guided"),
    "on_unknown": ("raise", "gradient"),
    "seed": ("relevance", "gradient"),
}


@dataclasses.dataclass(frozen=True)
class Composite:
    """An assignment of rules to layers.

    Attributes:
        name: for people.
        convolution: rule of convolutions; None leaves their gradient as it is.
        dense: rule of products with a matrix of parameters; None leaves their gradient as it is.
        first: rule of the first linear layer in the order of execution from the input, instead of the above.
        activation: "pass" hands relevance through an elementwise nonlinearity; "gradient" lets its derivative act;
            "guided" also drops negative values at a ReLU.
        zero_bias: biases and shifts outside of linear layers absorb nothing.
        stabilizer: for the divisions outside of linear layers.
        overrides: (pattern, rule) pairs; a layer whose weights' path in the tree of parameters matches the pattern
            ("encoder/*/kernel", shell wildcards) gets that rule; the first match counts, and a pattern without any is
            warned of. Paths are known where the parameters are an argument: `xda.relevance` and its kin, and `xda.lrp`
            of a functools.partial.
        on_unknown: "raise" for an operation without a rule, or "gradient" to let its plain gradient act, with a
            warning.
        seed: what a seed at the output means and what comes out at the input: "relevance" or "gradient".
    """

    name: str
    convolution: Rule | None
    dense: Rule | None
    first: Rule | None = None
    activation: Literal["pass", "gradient", "guided"] = "pass"
    zero_bias: bool = True
    stabilizer: float = 1e-6
    overrides: tuple[tuple[str, Rule], ...] = ()
    on_unknown: Literal["raise", "gradient"] = "raise"
    seed: Literal["relevance", "gradient"] = "relevance"

    def __post_init__(self) -> None:
        for where in ("convolution", "dense", "first"):
            _check_rule(where, getattr(self, where), first=where == "first")
        _check_overrides(self.overrides)
        for field, known in _KNOWN.items():
            value = getattr(self, field)
            if not isinstance(value, str) or value not in known:
                _check.fail(field, repr(value), " or ".join(map(repr, known)))
        rules.check_flag("zero_bias", self.zero_bias)
        rules.check_number("stabilizer", self.stabilizer)

    @property
    def differentiable(self) -> bool:
        """Whether relevance = input × modified gradient, also at the first layer."""
        return not isinstance(self.first, rules.FIRST_LAYER_ONLY)


def _check_rule(where: str, rule: Any, *, first: bool) -> None:
    if rule is not None and not isinstance(rule, Rule):
        _check.fail(where, repr(rule), "a rule of xda.rules, as rules.Epsilon(), or None")
    if isinstance(rule, rules.FIRST_LAYER_ONLY) and not first:
        _check.fail(where, rule, "a rule of the form activation times cotangent; this one only fits `first`")


def _check_overrides(overrides: Any) -> None:
    # Tuples throughout: a composite is hashed.
    if not isinstance(overrides, tuple):
        _check.fail("overrides", type(overrides).__name__, "a tuple of pairs (pattern, rule)")
    for pair in overrides:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            _check.fail("overrides", repr(pair), "pairs (pattern, rule), each a tuple with a string first")
        _check_rule(f"overrides[{pair[0]!r}]", pair[1], first=False)


def _positive(argument: str, value: Any) -> float:
    rules.check_number(argument, value.item() if np.shape(value) == () and hasattr(value, "item") else value)
    return float(value)


def _layered(
    name: str, convolution: Rule, epsilon: float, first: Rule | None, zero_bias: bool, stabilizer: float
) -> Composite:
    dense = rules.Epsilon(_positive("epsilon", epsilon), zero_bias)
    stabilizer = _positive("stabilizer", stabilizer)
    return Composite(name, convolution, dense, first, zero_bias=zero_bias, stabilizer=stabilizer)


def epsilon(*, zero_bias: bool = True, epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Composite:
    """ε-rule on every linear layer."""
    rule = rules.Epsilon(_positive("epsilon", epsilon), zero_bias)
    return _layered("epsilon", rule, epsilon, None, zero_bias, stabilizer)


def epsilon_plus(*, zero_bias: bool = True, epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Composite:
    """z⁺-rule on convolutions, ε-rule on dense layers."""
    return _layered("epsilon_plus", rules.ZPlus(stabilizer, zero_bias), epsilon, None, zero_bias, stabilizer)


def epsilon_plus_flat(*, zero_bias: bool = True, epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Composite:
    """`epsilon_plus` with the flat rule on the first layer."""
    first = rules.Flat(stabilizer)
    return _layered("epsilon_plus_flat", rules.ZPlus(stabilizer, zero_bias), epsilon, first, zero_bias, stabilizer)


def epsilon_alpha2_beta1(*, zero_bias: bool = True, epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Composite:
    """αβ-rule with α = 2, β = 1 on convolutions, ε-rule on dense layers.

    Where a layer's contributions all have one sign, nothing balances the other term and some relevance is lost.
    """
    convolution = rules.AlphaBeta(2.0, 1.0, stabilizer, zero_bias)
    return _layered("epsilon_alpha2_beta1", convolution, epsilon, None, zero_bias, stabilizer)


def epsilon_alpha2_beta1_flat(*, zero_bias: bool = True, epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Composite:
    """`epsilon_alpha2_beta1` with the flat rule on the first layer."""
    convolution = rules.AlphaBeta(2.0, 1.0, stabilizer, zero_bias)
    first = rules.Flat(stabilizer)
    return _layered("epsilon_alpha2_beta1_flat", convolution, epsilon, first, zero_bias, stabilizer)


def epsilon_gamma_box(
    low: float | Sequence[float],
    high: float | Sequence[float],
    *,
    gamma: float = 0.25,
    zero_bias: bool = True,
    epsilon: float = 1e-6,
    stabilizer: float = 1e-6,
) -> Composite:
    """z-box rule on the first layer, γ-rule on convolutions, ε-rule on dense layers.

    Args:
        low: the least value an input can have, one number or one for each entry of the last axis (channels).
        high: the greatest.
        gamma: how much contributions of the output's sign are favoured.
        zero_bias: see the module.
        epsilon: see the module.
        stabilizer: see the module.

    Raises:
        ValueError: a bound is not finite, or low is not below high.
    """
    lows, highs = np.asarray(low, np.float64), np.asarray(high, np.float64)
    for argument, bound in (("low", lows), ("high", highs)):
        if bound.ndim > 1 or bound.size == 0 or not np.isfinite(bound).all():
            _check.fail(argument, bound.tolist(), "one finite number, or one for each channel")
    if lows.ndim and highs.ndim and lows.shape != highs.shape:
        _check.fail("high", f"{highs.size} bounds", f"as many as low has ({lows.size})")
    if not (lows < highs).all():
        _check.fail("low", lows.tolist(), f"below high ({highs.tolist()})")
    box = rules.ZBox(_plain(lows), _plain(highs), stabilizer, zero_bias)
    convolution = rules.Gamma(_positive("gamma", gamma), stabilizer, zero_bias)
    return _layered("epsilon_gamma_box", convolution, epsilon, box, zero_bias, stabilizer)


def excitation_backprop(*, zero_bias: bool = True, epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Composite:
    """z⁺-rule on every linear layer. Source: Zhang et al. 2018.

    `epsilon` is accepted for uniformity; no layer uses the ε-rule.
    """
    _positive("epsilon", epsilon)
    rule = rules.ZPlus(_positive("stabilizer", stabilizer), zero_bias)
    return Composite(
        "excitation_backprop", rule, rule, activation="gradient", zero_bias=zero_bias, stabilizer=stabilizer
    )


def guided_backprop(*, zero_bias: bool = True, epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Composite:
    """The gradient with negative values dropped at every ReLU. Source: Springenberg et al. 2015.

    A gradient, not a decomposition: seed and result of `xda.relevance` are gradients, and nothing sums to the score.
    The three arguments are accepted for uniformity and change nothing.
    """
    _positive("epsilon", epsilon)
    return Composite(
        "guided_backprop",
        None,
        None,
        activation="guided",
        zero_bias=zero_bias,
        stabilizer=_positive("stabilizer", stabilizer),
        seed="gradient",
    )


def attn_lrp(*, zero_bias: bool = True, epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Composite:
    """AttnLRP for transformers. Source: Achtibat et al. 2024.

    ε-rule on every linear layer; half of the relevance to each factor of a product of two values (attention, gates);
    softmax by its gradient; normalisations with their statistics as constants; nonlinearities pass relevance. Softmax
    does not conserve relevance, so maps need not sum to the score.
    """
    rule = rules.Epsilon(_positive("epsilon", epsilon), zero_bias)
    return _layered("attn_lrp", rule, epsilon, None, zero_bias, stabilizer)


def _plain(bound: np.ndarray) -> float | tuple[float, ...]:
    return float(bound) if bound.ndim == 0 else tuple(float(b) for b in bound)
