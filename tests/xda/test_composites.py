"""Composites are plain data."""

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


def test_a_rule_of_the_first_layer_fits_nowhere_else():
    with pytest.raises(ValueError, match="dense"):
        composites.Composite("mine", rules.Epsilon(), rules.Flat())
