"""What the reports say is what the propagation does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import xda
from dualxda_jax.xda import composites


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), bias_init=nn.initializers.constant(0.3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = x + nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.relu(nn.Dense(5, bias_init=nn.initializers.constant(0.2))(x.mean((1, 2))))


@pytest.fixture(scope="module")
def net():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 6, 6, 3)), jnp.float32)
    return jax.jit(Net().init)(jax.random.key(0), x), x


def test_the_table_names_rule_and_weights_of_every_layer(net):
    variables, x = net
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    table = xda.explain_rules(Net().apply, variables, shape, composite=composites.epsilon_plus_flat())
    layers = {row.path: row for row in table.rows if row.path}
    assert list(layers) == ["Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel"]
    assert [row.rule.split("(")[0] for row in layers.values()] == ["Flat", "ZPlus", "Epsilon"]
    assert layers["Conv_0/kernel"].operation == "conv_general_dilated + add + sub + mul + add"
    assert layers["Conv_0/kernel"].module.endswith("Conv_0")
    assert layers["Dense_0/kernel"].shape == (2, 5)
    assert [row.rule for row in table.rows if row.operation == "add"] == ["share"]
    assert "Dense_0/kernel" in str(table)


def test_nothing_is_lost_with_zeroed_biases(net):
    variables, x = net
    report = xda.check_conservation(Net().apply, variables, x, composite=composites.epsilon_plus())
    np.testing.assert_allclose(report.seed, jnp.square(Net().apply(variables, x)).sum(), rtol=1e-5)
    assert abs(report.lost) < 1e-3
    assert all(abs(row.lost) < 1e-3 * report.seed for row in report.rows)


def test_kept_biases_lose_at_the_layers_that_have_them(net):
    variables, x = net
    composite = composites.epsilon_plus(zero_bias=False)
    report = xda.check_conservation(Net().apply, variables, x, composite=composite)
    losing = [row.path for row in report.rows if abs(row.lost) > 1e-2 * report.seed]
    assert losing == ["Conv_0/kernel", "Dense_0/kernel"]
    # What is lost on the way is what is missing at the end.
    np.testing.assert_allclose(sum(row.lost for row in report.rows), report.seed - report.input, rtol=1e-3)
    maps = xda.relevance(Net().apply, variables, x, jnp.square(Net().apply(variables, x)), composite=composite)
    np.testing.assert_allclose(report.input, maps.sum(), rtol=1e-4)
    assert "Conv_0/kernel" in str(report) and "Conv_1/kernel" not in str(report)
