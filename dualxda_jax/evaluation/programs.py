"""The compiled programs of `retrain`: many trainings side by side or in turn, on one device or split over several."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dualxda_jax import _check, models
from dualxda_jax.data import to_float
from dualxda_jax.models import training
from dualxda_jax.types import Array, Params

_QUERIES_AT_ONCE = 500


def across_or_default(across: str | None) -> str:
    """How networks are laid out, "map" or "vmap"; None takes what suits the device."""
    if across is None:
        return "map" if jax.default_backend() == "cpu" else "vmap"
    if across not in ("map", "vmap"):
        _check.fail("across", repr(across), '"map" or "vmap"')
    return across


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def train(
    module: Any, config: training.TrainConfig, across: str, sharding: NamedSharding | None, shared: Any, mine: Any
) -> tuple[Params, Array]:
    """Variables and last losses: of images and labels, by keys and rows."""
    return _spread(functools.partial(_train_one, module, config), across, sharding)(shared, mine)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def train_and_ask(
    module: Any, config: training.TrainConfig, across: str, sharding: NamedSharding | None, shared: Any, mine: Any
) -> tuple[Array, Array]:
    """Logits at the queries and last losses: of images, labels and queries, by keys and rows."""

    def one(shared: tuple[Array, Array, Array], mine: tuple[Array, Array]) -> tuple[Array, Array]:
        images, labels, queries = shared
        variables, loss = _train_one(module, config, (images, labels), mine)
        apply = models.faster_apply(module) or module.apply
        answer = lax.map(
            lambda x: apply(variables, to_float(x)[None])[0], queries, batch_size=min(len(queries), _QUERIES_AT_ONCE)
        )
        return answer.astype(jnp.float32), loss

    return _spread(one, across, sharding)(shared, mine)


def _train_one(
    module: Any, config: training.TrainConfig, shared: tuple[Array, Array], mine: tuple[Array, Array]
) -> tuple[Params, Array]:
    (images, labels), (key, rows) = shared, mine
    apply = models.faster_apply(module)
    state = training.init(jax.random.split(key)[0], module, images[:1], config)

    def body(state: training.TrainState, rows: Array) -> tuple[training.TrainState, Array]:
        state, metrics = training.step(state, (images[rows], labels[rows]), apply=apply)
        return state, metrics["loss"]

    state, losses = lax.scan(body, state, rows)
    return state.variables, losses[-1]


def _spread(one: Callable[[Any, Any], Any], across: str, sharding: NamedSharding | None) -> Callable[[Any, Any], Any]:
    """(what all share, what each has with a leading m axis) -> results with a leading m axis."""

    def every(shared: Any, mine: Any) -> Any:
        if across == "vmap":
            return jax.vmap(functools.partial(one, shared))(mine)
        return lax.map(functools.partial(one, shared), mine)

    if sharding is None:
        return every
    split = PartitionSpec(*sharding.spec[:1])
    return jax.shard_map(every, mesh=sharding.mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False)


def rows(keys: Array, subsets: np.ndarray, config: training.TrainConfig) -> Array:
    """[m, steps, batch] places in the training set, in the order in which `fit` would show each subset."""
    return jnp.asarray(
        np.stack(
            [
                training.rows(jax.random.split(key)[1], np.flatnonzero(subset), config)
                for key, subset in zip(keys, subsets, strict=True)
            ]
        )
    )


def placed(sharding: NamedSharding | None, mine: Any, shared: Any) -> tuple[Any, Any]:
    """What each network has, split over the devices, and what all share, on each of them."""
    if sharding is None:
        return mine, shared
    split = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    return jax.device_put(mine, split), jax.device_put(shared, NamedSharding(sharding.mesh, PartitionSpec()))


def devices_of(sharding: NamedSharding | None) -> int:
    """Over how many devices the networks are split."""
    if sharding is None:
        return 1
    first = sharding.spec[0] if len(sharding.spec) else None
    names = first if isinstance(first, tuple) else () if first is None else (first,)
    return int(np.prod([sharding.mesh.shape[name] for name in names], dtype=int))


def bytes_of_step(module: Any, images: Any, config: training.TrainConfig) -> int:
    """Memory that one network's step takes: its state and all intermediate results, as if none were reused.

    Args:
        module: a linen module.
        images: [n, ...] only shape and dtype count.
        config: how it is trained.
    """
    example = jax.ShapeDtypeStruct((config.batch_size, *np.shape(images)[1:]), images.dtype)
    labels = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)

    def one(key: Array, x: Array, y: Array) -> Any:
        state = training.init(key, module, x[:1], config)
        return training.step(state, (x, y), apply=models.faster_apply(module))

    traced = jax.make_jaxpr(one)(jax.random.key(0), example, labels)
    return _size(traced.jaxpr)


def _size(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inner = [p.jaxpr for p in equation.params.values() if hasattr(p, "jaxpr")]
        total += sum(_size(j) for j in inner)
        total += sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars)
    return total
