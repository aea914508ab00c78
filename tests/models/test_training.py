import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import checkpoint, models
from dualxda_jax.models import training


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(8)(x.reshape((x.shape[0], -1)))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(3, name="head")(x)


@pytest.fixture
def images(rng):
    labels = np.arange(90) % 3
    noise = rng.integers(0, 60, (90, 4, 4, 1))
    return (noise + 60 * labels[:, None, None, None]).astype(np.uint8), labels


CONFIG = training.TrainConfig(steps=60, batch_size=16, learning_rate=0.05)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_fit_learns_and_predict_agrees_at_ragged_sizes(optimizer, images):
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    steps = []
    state = training.fit(jax.random.key(0), Tiny(), *images, config=config, progress=lambda *a: steps.append(a))
    assert steps == [(i + 1, 60) for i in range(60)]
    logits_fn = models.from_linen(Tiny(), head="head").logits
    logits = training.predict(logits_fn, state.variables, images[0], batch_size=32)
    assert training.accuracy(logits, images[1]) > 0.9
    assert np.allclose(logits, logits_fn(state.variables, training.to_float(jnp.asarray(images[0]))), atol=1e-5)


def test_step_compiles_once_ignores_masked_rows_and_updates_statistics(images):
    traces = []

    @jax.jit
    def step(state, batch):
        traces.append(1)
        return training.step(state, batch)

    state = training.init(jax.random.key(0), Tiny(), images[0][:1], CONFIG)
    after = state
    for start in (0, 16, 32):
        after, metrics = step(after, (images[0][start : start + 16], images[1][start : start + 16]))
    assert len(traces) == 1 and int(after.step) == 3 and metrics.keys() == {"loss", "accuracy"}
    assert not same(state.variables["batch_stats"], after.variables["batch_stats"])
    mask = np.arange(16) < 9
    wrong = np.where(mask, images[1][:16], (images[1][:16] + 1) % 3)
    one = training.step(state, (images[0][:16], images[1][:16], mask))
    two = training.step(state, (images[0][:16], wrong, mask))
    assert same(one, two)


def test_the_same_key_gives_the_same_network_and_another_key_another(images):
    fit = functools.partial(training.fit, module=Tiny(), images=images[0], labels=images[1], config=CONFIG)
    assert same(fit(jax.random.key(1)), fit(jax.random.key(1)))
    assert not same(fit(jax.random.key(1)).variables, fit(jax.random.key(2)).variables)


@pytest.mark.parametrize("stop", [3, 6, 20])
def test_interrupted_and_resumed_equals_uninterrupted(stop, images, tmp_path):
    class Interruption(Exception):
        pass

    def interrupt(done, total):
        if done == stop:
            raise Interruption

    fit = functools.partial(training.fit, jax.random.key(0), Tiny(), *images, config=CONFIG)
    with pytest.raises(Interruption):
        fit(checkpoint_dir=tmp_path, progress=interrupt)
    steps = []
    resumed = fit(checkpoint_dir=tmp_path, progress=lambda done, total: steps.append(done))
    assert steps[0] == (stop - 1) // 6 * 6 + 1
    assert same(resumed, fit())
    with pytest.raises(checkpoint.StaleCheckpoint):
        training.fit(jax.random.key(0), Tiny(), images[0], images[1][::-1], config=CONFIG, checkpoint_dir=tmp_path)


def test_a_write_that_was_cut_off_is_no_obstacle(images, tmp_path, monkeypatch):
    fit = functools.partial(training.fit, jax.random.key(0), Tiny(), *images, config=CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.folder.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(checkpoint_dir=tmp_path)
    assert list((tmp_path / "latest").iterdir())
    assert same(fit(checkpoint_dir=tmp_path), fit())


def test_bad_input_is_named(images):
    with pytest.raises(ValueError, match="labels"):
        training.fit(jax.random.key(0), Tiny(), images[0], images[1][1:], config=CONFIG)
    with pytest.raises(ValueError, match="labels"):
        training.fit(jax.random.key(0), Tiny(), images[0], images[1].astype(float), config=CONFIG)
    with pytest.raises(ValueError, match="labels: got 99 at position 0"):
        training.fit(jax.random.key(0), Tiny(), images[0], np.full_like(images[1], 99), config=CONFIG)
    with pytest.raises(ValueError, match="key: got int, must be a typed key"):
        training.fit(0, Tiny(), *images, config=CONFIG)
    with pytest.raises(ValueError, match="optimizer"):
        training.TrainConfig(optimizer="lion")
    for bad in ({"steps": 1.5}, {"batch_size": 0}, {"learning_rate": "a"}, {"momentum": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
            training.TrainConfig(**bad)
    with pytest.raises(ValueError, match="warmup: got 2"):
        training.TrainConfig(warmup=2.0)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        training.predict(lambda params, x: x, {}, images[0], batch_size=0)


def test_a_loss_that_is_not_finite_says_why(images):
    spoiled = images[0].astype(np.float32)
    spoiled[5] = np.nan
    with pytest.raises(FloatingPointError, match="1 images hold NaN or Inf, first 5"):
        training.fit(jax.random.key(0), Tiny(), spoiled, images[1], config=CONFIG)
    wild = dataclasses.replace(CONFIG, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        training.fit(jax.random.key(0), Tiny(), *images, config=wild)


def test_config_for_scales_epochs_with_the_size():
    assert training.config_for(60_000).steps > training.config_for(6_000).steps
    assert training.config_for(1_000, epochs=3, batch_size=100).steps == 30
