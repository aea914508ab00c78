import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dualxda_jax import models


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Dense(6)(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x)


class Setup(nn.Module):
    def setup(self):
        self.body = nn.Dense(6)
        self.head = nn.Dense(3, use_bias=False)

    def __call__(self, x):
        return self.head(nn.relu(self.body(x)))


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Setup(name="decoder")(nn.Dense(5)(x))


class SameNames(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Setup(name="head")(x)


class Rematerialised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Setup)(name="decoder")(x)


class Twice(nn.Module):
    def setup(self):
        self.head = nn.Dense(4)
        self.unused = nn.Dense(4)

    def __call__(self, x):
        return self.head(nn.relu(self.head(x)))


class Sequence(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(jnp.stack([x, x], axis=1)).mean(axis=1)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.encoder = nnx.Sequential(nnx.Linear(6, 5, rngs=rngs), nnx.relu, nnx.Linear(5, 3, rngs=rngs))
        self.unused = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return self.encoder(self.drop(self.norm(self.first(x))))


class NnxTwice(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(4, 4, rngs=rngs)
        self.alias = self.head

    def __call__(self, x):
        return self.head(self.alias(x))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(7, 4)).astype("float32"))


LINEN = [
    (Compact(), "head"),
    (Setup(), "head"),
    (Nested(), "decoder/head"),
    (Nested(), "decoder.head"),
    (SameNames(), "head/head"),
    (Rematerialised(), "decoder/head"),
]


@pytest.mark.parametrize(("module", "head"), LINEN)
def test_linen_features_times_head_are_the_logits(module, head, x):
    variables = module.init(jax.random.key(0), x)
    model = models.from_linen(module, head=head)
    features = jax.jit(model.features)(variables, x)
    weights, bias = models.head_weights(model, variables)
    assert features.shape == (7, 6) and weights.shape == (3, 6)
    assert jnp.allclose(features @ weights.T + bias[None], module.apply(variables, x), atol=1e-6)
    assert jnp.array_equal(model.logits(variables, x), module.apply(variables, x))
    assert model.head == head.replace(".", "/")


def test_linen_under_grad_and_vmap(x):
    module = Nested()
    variables = module.init(jax.random.key(0), x)
    model = models.from_linen(module, head="decoder/head")
    one_by_one = jax.vmap(lambda row: model.features(variables, row[None])[0])(x)
    assert jnp.allclose(one_by_one, model.features(variables, x), atol=1e-6)
    gradient = jax.grad(lambda v: model.features(v, x).sum())(variables)["params"]
    assert not gradient["decoder"]["head"]["kernel"].any()
    assert gradient["decoder"]["body"]["kernel"].any()


def test_bare_params_and_equal_arguments_share_functions(x):
    variables = Setup().init(jax.random.key(0), x)
    model = models.from_linen(Setup(), head="head")
    assert jnp.array_equal(model.features(variables["params"], x), model.features(variables, x))
    assert models.from_linen(Setup(), head="head").features is model.features


def test_call_kwargs_reach_the_module(x):
    variables = Compact().init(jax.random.key(0), x)
    model = models.from_linen(Compact(), head="head", call_kwargs={"train": True})
    # In train mode BatchNorm would update its statistics, which the adapter's functions never do.
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        model.features(variables, x)


@pytest.mark.parametrize(
    ("module", "head", "message"),
    [
        (Nested(), "hed", "'hed'.*'Dense_0', 'decoder/body', 'decoder/head'"),
        (Nested(), "decoder", "a Setup"),
        (Twice(), "head", "called 2 times"),
        (Twice(), "unused", "head: got 'unused'"),
        (Sequence(), "head", r"\(7, 2, 4\)"),
    ],
)
def test_linen_heads_that_cannot_be(module, head, message, x):
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="head: .*" + message if not message.startswith("head") else message):
        models.from_linen(module, head=head).features(variables, x)


@pytest.mark.parametrize("adapter", [models.from_linen, models.from_nnx])
def test_what_is_no_module_is_named(adapter):
    with pytest.raises(ValueError, match="module: got int"):
        adapter(3, head="head")


@pytest.mark.parametrize("head", ["", "a//b", None])
def test_a_head_that_is_no_path(head):
    with pytest.raises(ValueError, match="head"):
        models.from_linen(Setup(), head=head)


@pytest.mark.parametrize("head", ["encoder.layers.2", "encoder/layers/2"])
def test_nnx_features_times_head_are_the_logits(head, x):
    module = NnxNet(nnx.Rngs(0))
    before = jax.tree.leaves(nnx.state(module, nnx.BatchStat))
    model, params = models.from_nnx(module, head=head)
    features = jax.jit(model.features)(params, x)
    weights, bias = models.head_weights(model, params)
    assert jnp.allclose(features @ weights.T + bias[None], jax.jit(model.logits)(params, x), atol=1e-6)
    module.eval()
    assert jnp.allclose(module(x), model.logits(params, x), atol=1e-6)
    assert all(map(jnp.array_equal, before, jax.tree.leaves(nnx.state(module, nnx.BatchStat))))


def test_nnx_module_stays_in_train_mode_and_works_under_grad_and_vmap(x):
    module = NnxNet(nnx.Rngs(0))
    model, params = models.from_nnx(module, head="encoder/layers/2")
    assert not module.drop.deterministic and not module.norm.use_running_average
    assert type(module.encoder.layers[2]) is nnx.Linear
    one_by_one = jax.vmap(lambda row: model.features(params, row[None])[0])(x)
    assert jnp.allclose(one_by_one, model.features(params, x), atol=1e-6)
    gradient = jax.grad(lambda p: model.features(p, x).sum())(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert not models.head_weights(model, gradient)[0].any()


@pytest.mark.parametrize(
    ("kind", "head", "message"),
    [
        (NnxNet, "hed", "'hed'.*'first'"),
        (NnxNet, "norm", "a BatchNorm"),
        (NnxNet, "unused", "not called"),
        (NnxTwice, "head", "called 2 times"),
    ],
)
def test_nnx_heads_that_cannot_be(kind, head, message, x):
    def run():
        model, params = models.from_nnx(kind(nnx.Rngs(0)), head=head)
        model.features(params, x)

    with pytest.raises(ValueError, match="head: .*" + message):
        run()
