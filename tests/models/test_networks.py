import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import models


def test_small_cnn_is_the_papers():
    shapes = jax.eval_shape(models.SmallCNN().init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    kernels = {name: layer["kernel"].shape for name, layer in shapes.items()}
    assert kernels == {
        "conv_0": (3, 3, 1, 5),
        "conv_1": (3, 3, 5, 10),
        "conv_2": (3, 3, 10, 5),
        "dense_0": (22 * 22 * 5, 500),
        "dense_1": (500, 100),
        models.HEAD: (100, 10),
    }


def test_images_too_small_for_the_small_cnn_are_named():
    with pytest.raises(ValueError, match="images: got 6 × 28 pixels, must be 7 × 7 or more"):
        jax.eval_shape(models.SmallCNN().init, jax.random.key(0), jnp.zeros((1, 6, 28, 1)))


@pytest.mark.parametrize(
    ("network", "parameters", "dimension"),
    # Counts of torchvision's networks with 10 classes, less the 7×7 stem (9,408), plus the 3×3 one (1,728).
    [(models.ResNet18, 11_173_962, 512), (models.ResNet50, 23_520_842, 2048)],
)
def test_resnets_have_the_published_size(network, parameters, dimension):
    module = network(num_classes=10)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    features = models.from_linen(module, head=models.HEAD).features
    assert jax.eval_shape(features, variables, jnp.zeros((3, 32, 32, 3))).shape == (3, dimension)


def test_resnet_in_eval_mode_treats_rows_apart_and_in_train_mode_updates_statistics(rng):
    module = models.ResNet18(num_classes=3, width=4)
    x = jnp.asarray(rng.random((4, 8, 8, 3), dtype="float32"))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    together = jax.jit(module.apply)(variables, x)
    alone = jax.jit(module.apply)(variables, x[:1])
    assert jnp.allclose(together[:1], alone, atol=1e-5)
    _, updated = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), variables["batch_stats"], updated["batch_stats"])
    assert all(jax.tree.leaves(moved))


def test_the_folded_small_cnn_is_the_small_cnn(rng):
    shape = (2, 9, 12, 3)  # an odd height and an even width
    module = models.SmallCNN(num_classes=4)
    x = jnp.asarray(rng.random(shape), jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    plain, folded = (
        jax.jit(jax.value_and_grad(lambda v, f=f: (f(v, x) ** 2).sum()))
        for f in (module.apply, models.small_cnn_logits)
    )
    (a, da), (b, db) = plain(variables), folded(variables)
    assert a == pytest.approx(float(b), rel=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(da))
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, atol=1e-5 * largest, rtol=1e-4), da, db)
