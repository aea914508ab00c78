"""Composites are plain data."""

import dataclasses
import functools

import pytest

from dualxda_jax.xda import composites, rules

FACTORIES = [
    composites.epsilon,
    composites.epsilon_plus,
    composites.epsilon_plus_flat,
    composites.epsilon_alpha2_beta1,
    composites.epsilon_alpha2_beta1_flat,
    lambda **options: composites.epsilon_gamma_box((-1, -2), 3, **options),
    composites.excitation_backprop,
    composites.guided_backprop,
    composites.attn_lrp,
]


@pytest.mark.parametrize("factory", FACTORIES)
def test_equal_options_make_equal_composites(factory):
    one, other = factory(), factory(zero_bias=True, epsilon=1e-6, stabilizer=1e-6)
    assert one == other and hash(one) == hash(other) and str(one) == str(other)
    assert factory(zero_bias=False) != one
    with pytest.raises(AttributeError):
        one.name = "another"


@pytest.mark.parametrize("factory", FACTORIES)
def test_negative_constants_are_refused(factory):
    with pytest.raises(ValueError, match="epsilon"):
        factory(epsilon=-1.0)
    with pytest.raises(ValueError, match="stabilizer"):
        factory(stabilizer=float("nan"))


def test_what_goes_where():
    composite = composites.epsilon_gamma_box((-1, -2), 3, epsilon=0.1, stabilizer=0.2, zero_bias=False)
    assert composite.first == rules.ZBox((-1.0, -2.0), 3.0, 0.2, False)
    assert composite.convolution == rules.Gamma(0.25, 0.2, False)
    assert composite.dense == rules.Epsilon(0.1, False)


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="low"):
        composites.epsilon_gamma_box(1.0, 1.0)
    with pytest.raises(ValueError, match="high"):
        composites.epsilon_gamma_box((0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="low"):
        composites.epsilon_gamma_box((), 1.0)


def test_alpha_beta_must_differ_by_one():
    with pytest.raises(ValueError, match="alpha"):
        rules.AlphaBeta(2.0, 2.0)


FIELDS = [
    ("activation", "foo"),
    ("seed", ["relevance"]),
    ("on_unknown", None),
    ("dense", "epsilon"),
    ("convolution", rules.Epsilon),
    ("first", 1.0),
    ("overrides", (("c/*", "gamma"),)),
    ("overrides", [("c/*", rules.Gamma())]),
    ("overrides", {"c/*": rules.Gamma()}),
    ("overrides", ("c/*", rules.Gamma())),
    ("overrides", (("c/*", rules.Flat()),)),
    ("zero_bias", "no"),
    ("stabilizer", "a"),
    ("stabilizer", -1e-6),
]


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=[f"{field} {value}" for field, value in FIELDS])
def test_fields_that_say_nothing_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"^{field}.*: got .*, must be "):
        dataclasses.replace(composites.epsilon(), **{field: value})


BAD_RULES = [
    (rules.Gamma, "gamma", -1.0),
    (rules.Gamma, "zero_bias", 0.25),
    (rules.Epsilon, "epsilon", "a"),
    (rules.Epsilon, "epsilon", True),
    (rules.ZPlus, "stabilizer", float("inf")),
    (rules.AlphaBeta, "beta", None),
    (functools.partial(rules.ZBox, high=1.0), "low", [0.0]),
    (functools.partial(rules.ZBox, low=0.0), "high", (1.0, float("nan"))),
]


@pytest.mark.parametrize(("rule", "field", "value"), BAD_RULES)
def test_constants_of_rules_are_checked(rule, field, value):
    with pytest.raises(ValueError, match=f"^{field}: got "):
        rule(**{field: value})
    with pytest.raises(ValueError, match="epsilon: got 'a'"):
        composites.epsilon(epsilon="a")


def test_a_rule_of_the_first_layer_fits_nowhere_else():
    with pytest.raises(ValueError, match="dense"):
        composites.Composite("mine", rules.Epsilon(), rules.Flat())
