"""Arrays over a mesh: the methods leave it to the compiler to place what they compute, and know how many devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding

from dualxda_jax import _check


def automatic(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, given arrays over Explicit mesh axes as arrays over Auto axes of the same devices.

    Nothing is moved, and what comes back lies over Auto axes. Per-sample gradients, chunks and projections reshape and
    gather along the samples, for which Explicit axes would ask to be told in every line where the result shall lie.
    While the function runs, the mesh of its arrays is the one that is set, so that `devices` knows it.

    Raises:
        ValueError: in a trace, where an array's place is a part of its type.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        mesh = _mesh((args, kwargs))
        if mesh is None:
            return function(*args, **kwargs)
        args, kwargs = jax.tree.map(functools.partial(_moved, mesh), (args, kwargs))
        with jax.set_mesh(_auto(mesh)):
            return function(*args, **kwargs)

    return run


def devices() -> int:
    """Over how many devices the samples may lie: those of the mesh that is set, which traced functions see too."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def _mesh(tree: Any) -> Mesh | None:
    """The mesh to run over, or None to leave the one that is set."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    for leaf in leaves:
        if _check.is_traced(leaf):
            mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
            if mesh is not None and not mesh.empty and AxisType.Explicit in mesh.axis_types:
                was = f"traced over the Explicit mesh axes {mesh.axis_names}"
                _check.fail("an array", was, "over Auto axes, or given outside of jit")
        elif isinstance(leaf.sharding, NamedSharding) and _is_explicit(leaf.sharding.mesh):
            return leaf.sharding.mesh  # type: ignore[return-value]
    # In a trace, which makes tracers of constants too, no mesh can be set.
    if any(map(_check.is_traced, [*leaves, jnp.zeros(())])):
        return None
    placed = [leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    if placed:
        return placed[0]  # type: ignore[return-value]
    # Arrays on one device, where the caller has set a mesh with Explicit axes.
    if not _is_explicit(jax.sharding.get_abstract_mesh()):
        return None
    get_mesh = getattr(jax.sharding, "get_mesh", None)  # not in jax 0.8
    return get_mesh() if get_mesh is not None else None


def _is_explicit(mesh: Any) -> bool:
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def _auto(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _moved(mesh: Mesh, leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or not isinstance(leaf.sharding, NamedSharding):
        return leaf
    if leaf.sharding.mesh != mesh:
        return leaf
    return jax.device_put(leaf, NamedSharding(_auto(mesh), leaf.sharding.spec))
