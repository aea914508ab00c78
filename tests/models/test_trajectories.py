import flax.linen as nn
import jax
import numpy as np
import pytest

from dualxda_jax.models import training, trajectory

KEY = jax.random.key(0)
CONFIG = training.TrainConfig(steps=9, batch_size=8, optimizer="sgd", learning_rate=0.05)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(x.reshape((x.shape[0], -1)))


@pytest.fixture
def images(rng):
    return rng.integers(0, 255, (20, 2, 2, 1)).astype(np.uint8), np.arange(20) % 3


def test_the_end_is_where_fit_ends_and_rates_are_those_of_the_schedule(images):
    seen = []
    got = trajectory(KEY, Linear(), *images, config=CONFIG, checkpoints=3, progress=lambda *a: seen.append(a))
    state = training.fit(KEY, Linear(), *images, config=CONFIG)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got.checkpoints[-1], state.variables
    )
    with jax.numpy_dtype_promotion("standard"):
        rates = [float(training.schedule(CONFIG)(step)) for step in range(9)]
    np.testing.assert_allclose(got.learning_rates, np.reshape(rates, (3, 3)).mean(axis=1), rtol=1e-5)
    assert len(got.checkpoints) == 3 and seen[-1] == (9, 9)
    # The first is what a run that stopped there would have had.
    early, late = (np.asarray(c["params"]["head"]["kernel"]) for c in (got.checkpoints[0], got.checkpoints[-1]))
    assert not np.allclose(early, late)


def test_the_module_may_be_replaced_by_an_equal_function(images):
    def apply(variables, x):
        head = variables["params"]["head"]
        return x.reshape((x.shape[0], -1)) @ head["kernel"] + head["bias"][None]

    plain, replaced = (trajectory(KEY, Linear(), *images, config=CONFIG, apply=f) for f in (None, apply))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain.checkpoints, replaced.checkpoints)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("images", {"images": np.zeros((0, 2, 2, 1)), "labels": np.zeros(0, int)}),
        ("labels", {"labels": np.zeros(20)}),
        ("labels", {"labels": np.zeros(3, int)}),
        ("labels", {"labels": np.full(20, -1)}),
        ("checkpoints", {"checkpoints": 0}),
        ("checkpoints", {"checkpoints": 10}),
    ],
)
def test_bad_input_is_named(name, change, images):
    options = {"images": images[0], "labels": images[1], "config": CONFIG}
    with pytest.raises(ValueError, match=f"^{name}: got"):
        trajectory(KEY, Linear(), **{**options, **change})


def test_a_loss_that_is_not_finite_is_an_error(images):
    wild = training.TrainConfig(steps=9, batch_size=8, optimizer="sgd", learning_rate=1e38)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        trajectory(KEY, Linear(), *images, config=wild)
