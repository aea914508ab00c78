"""Many networks at once: the same as one by one, in any chunks, on any devices, through any interruption."""

import os
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dualxda_jax import models
from dualxda_jax.evaluation import programs, retrain
from dualxda_jax.models import training


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(6)(x.reshape((x.shape[0], -1)))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(3, name="head")(x)


CONFIG = training.TrainConfig(steps=7, batch_size=8, optimizer="sgd", learning_rate=0.05)
KEY = jax.random.key(3)


def problem(networks=5, samples=40):
    rng = np.random.default_rng(1)
    labels = np.arange(samples) % 3
    images = (rng.integers(0, 60, (samples, 4, 4, 1)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    # Sizes that differ, so that passes end at different steps: from a few samples to all of them.
    sizes = np.linspace(3, samples, networks).astype(int)
    subsets = np.array([rng.permutation(samples) < size for size in sizes])
    return images, labels, subsets


@pytest.fixture(scope="module")
def alone():
    """Logits of networks trained one by one."""
    images, labels, subsets = problem()
    logits = models.from_linen(Tiny(), head="head").logits
    found = []
    for i, subset in enumerate(subsets):
        state = training.fit(jax.random.fold_in(KEY, i), Tiny(), images[subset], labels[subset], config=CONFIG)
        found.append(training.predict(logits, state.variables, images, batch_size=len(images)))
    return np.stack(found)


def ask(folder=None, rows=slice(None), key=KEY, **options):
    images, labels, subsets = problem()
    return retrain.logits(key, Tiny(), images, labels, subsets[rows], images, config=CONFIG, folder=folder, **options)


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 2}, {"across": "vmap", "memory": 1 << 30}])
def test_each_network_is_the_one_that_fit_trains_alone(options, alone):
    np.testing.assert_allclose(ask(**options), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("across", ["map", "vmap"])
def test_many_gives_the_parameters(across, alone):
    images, labels, subsets = problem()
    stacked = retrain.many(KEY, Tiny(), images, labels, subsets, config=CONFIG, across=across)
    assert all(len(leaf) == len(subsets) for leaf in jax.tree.leaves(stacked))
    x = training.to_float(jnp.asarray(images))
    logits = jax.vmap(lambda variables: Tiny().apply(variables, x))(stacked)
    np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_split_over_devices(kind, alone):
    mesh = jax.make_mesh((4,), ("networks",), axis_types=(kind,), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("networks"))
    # 5 networks on 4 devices: the second chunk is filled up.
    np.testing.assert_allclose(ask(sharding=sharding), alone, rtol=1e-4, atol=1e-5)


def test_chunks_fit_the_memory():
    images, _, _ = problem()
    one = programs.bytes_of_step(Tiny(), images, CONFIG)
    assert 1_000 < one < 1_000_000
    seen = []
    ask(across="vmap", memory=2 * one, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    small, large = (training.TrainConfig(steps=1, batch_size=b) for b in (8, 64))
    assert programs.bytes_of_step(Tiny(), images, large) > 2 * programs.bytes_of_step(Tiny(), images, small)


def stamps(folder):
    return {path.name: (path / "manifest.json").stat().st_mtime_ns for path in folder.iterdir()}


def test_nothing_is_trained_twice(tmp_path):
    first = ask(tmp_path, rows=slice(0, 3))
    before = stamps(tmp_path)
    seen = []
    # Other chunks, and the rows in another place with the keys that they had.
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(np.array([4, 2, 1, 0, 0]))
    images, labels, subsets = problem()
    again = retrain.logits(
        keys, Tiny(), images, labels, subsets[[4, 2, 1, 0, 0]], images, config=CONFIG, folder=tmp_path,
        across="map", workers=1, progress=lambda done, total: seen.append(done),
    )  # fmt: skip
    np.testing.assert_array_equal(again[1:], first[[2, 1, 0, 0]])
    assert seen == [4, 5] and len(stamps(tmp_path)) == 4
    assert before.items() <= stamps(tmp_path).items()


def test_other_data_are_another_network(tmp_path):
    ask(tmp_path, rows=slice(0, 1))
    images, labels, subsets = problem()
    retrain.logits(KEY, Tiny(), images, (labels + 1) % 3, subsets[:1], images, config=CONFIG, folder=tmp_path)
    retrain.logits(KEY, Tiny(), images, labels, subsets[:1], images[:4], config=CONFIG, folder=tmp_path)
    assert len(stamps(tmp_path)) == 3


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
import test_retrain as t
def progress(done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
t.ask(Path(sys.argv[1]), progress=progress, workers=2)
"""


def test_a_killed_run_goes_on_with_what_is_missing(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), os.path.dirname(__file__)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    before = stamps(tmp_path)
    assert len(before) == 3
    # A kill in the middle of a write leaves a folder without its manifest, and perhaps without anything.
    half, empty = list(before)[:2]
    (tmp_path / half / "manifest.json").unlink()
    for path in sorted((tmp_path / empty).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    seen = []
    got = ask(tmp_path, progress=lambda done, total: seen.append(done), workers=1)
    assert seen == [1, 2, 3, 4, 5]
    untouched = set(before) - {half, empty}
    assert all(stamps(tmp_path)[name] == before[name] for name in untouched)
    np.testing.assert_array_equal(got, ask(workers=1))


def test_a_loss_that_is_not_finite_names_the_network():
    images, labels, subsets = problem()
    wild = training.TrainConfig(steps=7, batch_size=8, optimizer="sgd", learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"not finite in network 0 .* lower learning_rate"):
        retrain.many(KEY, Tiny(), images, labels, subsets, config=wild)


def test_images_that_are_not_finite_are_named():
    images, labels, subsets = problem()
    images, subsets = images.astype(np.float32) / 255, subsets[:2].copy()
    images[7, 0, 0], images[9] = np.nan, np.inf
    subsets[:, 6:10] = [[False] * 4, [False, True, False, True]]
    expected = r"not finite in network 1 \(1 in all\): images: NaN or Inf in 2 of its samples, first in row 7$"
    with pytest.raises(FloatingPointError, match=expected):
        retrain.many(KEY, Tiny(), images, labels, subsets, config=CONFIG)


def test_the_same_shapes_compile_once():
    misses = programs.train_and_ask._cache_size()
    ask(workers=1, across="map")
    compiled = programs.train_and_ask._cache_size()
    ask(workers=1, across="map", key=jax.random.key(9), rows=slice(1, 4))
    assert programs.train_and_ask._cache_size() == compiled <= misses + 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("images", {"images": np.zeros((0, 4, 4, 1), np.uint8)}),
        ("labels", {"labels": np.zeros(40)}),
        ("labels", {"labels": np.zeros(39, int)}),
        ("labels", {"labels": np.full(40, 3)}),
        ("labels", {"labels": np.arange(40) % 3 - 1}),
        ("subsets", {"subsets": np.ones((2, 40))}),
        ("subsets", {"subsets": np.ones((2, 39), bool)}),
        ("subsets", {"subsets": np.zeros((2, 40), bool)}),
        ("subsets", {"subsets": np.zeros((0, 40), bool)}),
        ("key", {"key": 0}),
        ("key", {"key": jax.random.split(KEY, 3)}),
        ("queries", {"queries": np.zeros((3, 4, 4, 3), np.uint8)}),
        ("queries", {"queries": np.zeros((0, 4, 4, 1), np.uint8)}),
        ("across", {"across": "pmap"}),
        ("workers", {"workers": 0}),
        ("memory", {"memory": 0}),
    ],
)
def test_bad_input_is_named(name, change):
    images, labels, subsets = problem()
    options = {"key": KEY, "images": images, "labels": labels, "subsets": subsets, "queries": images, "config": CONFIG}
    with pytest.raises(ValueError, match=f"^{name}: got"):
        retrain.logits(module=Tiny(), **{**options, **change})
