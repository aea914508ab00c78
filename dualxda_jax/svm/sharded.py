"""A solve of rows that lie over the axes of a mesh: the programs of `resident` on each device's part.

A pass is a fold over the rows that a device has and one sum over the devices of [k, d]; a block of samples, at most as
many as one device has rows, is summed together from where its rows are and solved for by every device alike. Nothing of
the size of all rows is moved. Only Newton's method does this.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualxda_jax import _check
from dualxda_jax.svm import driver, resident, traced
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.driver import Answer, Data
from dualxda_jax.svm.inputs import Start, in_trace
from dualxda_jax.svm.problem import Array, Axis, summed, taken
from dualxda_jax.svm.working_set import SolverState
from dualxda_jax.types import SolveInfo

NOWHERE: Any = PartitionSpec()


class Rows(NamedTuple):
    """How rows lie over a mesh."""

    mesh: Any
    axis: Axis


def rows_of(features: Any, config: SolverConfig) -> Rows | None:
    """How the rows lie over several devices; None if they do not.

    Raises:
        ValueError: `config.axis` names what is no axis, or `config.method` is "coordinate".
    """
    rows = _found(features, config)
    if rows is None:
        return None
    if config.method == "coordinate":
        _check.fail("config.method", "'coordinate' for rows over several devices", "'auto' or 'newton'")
    return rows


def _found(features: Any, config: SolverConfig) -> Rows | None:
    if not isinstance(features, jax.Array):
        return None
    if in_trace(features) and config.axis is not None:
        mesh: Any = jax.sharding.get_abstract_mesh()
        names = (config.axis,) if isinstance(config.axis, str) else config.axis
        if not set(names) <= set(mesh.axis_names):
            _check.fail("config.axis", config.axis, f"among the axes {mesh.axis_names} of the mesh (jax.set_mesh)")
        devices = math.prod(mesh.shape[name] for name in names)
        if features.shape[0] % devices:
            _check.fail("features", f"{features.shape[0]} rows", f"a multiple of {devices}, the devices of config.axis")
        return Rows(mesh, config.axis)
    sharding: Any = jax.typeof(features).sharding if in_trace(features) else features.sharding
    spec: Any = getattr(sharding, "spec", ())
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or len(spec) == 0 or spec[0] is None:
        return None
    if in_trace(features) and AxisType.Explicit not in mesh.axis_types:
        return None
    names = (spec[0],) if isinstance(spec[0], str) else spec[0]
    return None if all(mesh.shape[name] == 1 for name in names) else Rows(mesh, spec[0])


def resolved(config: SolverConfig, rows: Rows) -> SolverConfig:
    """The config of each device."""
    return dataclasses.replace(config, method="newton", axis=rows.axis)


def _data(axis: Axis) -> Any:
    rows: Any = PartitionSpec(axis)
    matrix: Any = PartitionSpec(axis, None)
    return Data(matrix, rows, rows, NOWHERE)


def _state(axis: Axis) -> Any:
    each, simplex = PartitionSpec(axis), PartitionSpec(None, axis)
    fields = {"simplex": simplex, "lead": each, "norms": each}
    names = [name for name in SolverState.__dataclass_fields__ if name != "method"]
    return SolverState(**{name: fields.get(name, NOWHERE) for name in names})


def _start(axis: Axis) -> Any:
    matrix: Any = PartitionSpec(axis, None)
    return Start(matrix, NOWHERE)


def _answer(axis: Axis) -> Any:
    matrix: Any = PartitionSpec(axis, None)
    return Answer(matrix, NOWHERE, SolveInfo(NOWHERE, NOWHERE, NOWHERE, NOWHERE, NOWHERE))


def laid(rows: Rows, data: Data, start: Start | None) -> tuple[Data, Start | None]:
    """Everything where it belongs."""
    wanted = _data(rows.axis), None if start is None else _start(rows.axis)
    if not in_trace(data, start):
        return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(rows.mesh, spec)), (data, start), wanted)
    if AxisType.Explicit in rows.mesh.axis_types:
        return jax.tree.map(jax.sharding.reshard, (data, start), wanted)
    return data, start


def _over(rows: Rows, fn: Any, ins: Any, outs: Any) -> Any:
    mesh = rows.mesh if isinstance(rows.mesh, jax.sharding.Mesh) else None
    return jax.shard_map(fn, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)


def solve_traced(rows: Rows, data: Data, start: Start | None, *, num_classes: int, config: SolverConfig) -> Answer:
    """The whole solve as a part of somebody's program."""
    fit = functools.partial(traced.solve_traced, num_classes=num_classes, config=config)
    ins = _data(rows.axis), None if start is None else _start(rows.axis)
    return _over(rows, fit, ins, _answer(rows.axis))(data, start)


@functools.cache
def _program(name: str, rows: Rows, **static: Any) -> Any:
    """One of the programs below, on every device's part."""
    data, state, answer = _data(rows.axis), _state(rows.axis), _answer(rows.axis)
    programs: dict[str, tuple[Any, Any, Any]] = {
        "first_state": (driver.first_state, (data, _start(rows.axis)), state),
        "zero_state": (lambda data, **given: driver.first_state(data, None, **given), (data,), state),
        "surveyed": (resident.surveyed, (data, NOWHERE, NOWHERE, NOWHERE), state),
        "sampled": (resident.sampled, (data,), (NOWHERE, NOWHERE, NOWHERE)),
        "picked": (_picked, (data, NOWHERE), Data(NOWHERE, NOWHERE, NOWHERE, NOWHERE)),
        "one_round": (driver.one_round, (data, state, NOWHERE), (state, NOWHERE, NOWHERE)),
        "certified": (driver.certified, (data, state), answer),
    }
    fn, ins, outs = programs[name]
    return jax.jit(_over(rows, functools.partial(fn, **static), ins, outs))


def _rows(data: Data) -> Rows:
    sharding: Any = data.features.sharding
    return Rows(sharding.mesh, sharding.spec[0])


def most_rows(data: Data, config: SolverConfig) -> int:
    """Rows that a block may have: as many as one device has."""
    rows = int(data.features.sharding.shard_shape(data.features.shape)[0])
    return min(max(rows, driver.least_block(config)), int(data.features.shape[0]))


def first_state(
    data: Data, start: Start | None, *, num_classes: int, config: SolverConfig, precise: bool = True
) -> SolverState:
    """From a solution, or from zero or a sample; always in float64."""
    del precise
    if start is None:
        return _program("zero_state", _rows(data), num_classes=num_classes, config=config)(data)
    return _program("first_state", _rows(data), num_classes=num_classes, config=config)(data, start)


def surveyed(
    data: Data, weights: Array, penalty: Array, visits: Array, *, num_classes: int, config: SolverConfig
) -> SolverState:
    """The state at W with every sample on the class that leads there."""
    program = _program("surveyed", _rows(data), num_classes=num_classes, config=config)
    return program(data, weights, penalty, visits)


def sampled(data: Data, *, num_classes: int, config: SolverConfig, size: int) -> tuple[Array, Array, Array]:
    """W, penalty and visits from about `size` rows."""
    return _program("sampled", _rows(data), num_classes=num_classes, config=config, size=size)(data)


def picked(data: Data, places: Any) -> Data:
    """Some rows on every device, at costs scaled up to weigh as much as all of them."""
    rows = _rows(data)
    return _program("picked", rows, axis=rows.axis)(data, jnp.asarray(places))


def _picked(data: Data, places: Array, *, axis: Axis) -> Data:
    features, labels, costs = (taken(array, places, axis) for array in data[:3])
    total, ours = summed(jnp.sum(data.costs), axis), jnp.sum(costs)
    return Data(features, labels, costs * (total / jnp.maximum(ours, jnp.finfo(ours.dtype).tiny)), data.margin)


def one_round(
    data: Data, state: SolverState, target: Array, *, size: int, config: SolverConfig, precise: bool
) -> tuple[SolverState, Array, Array]:
    """A round, and what the host decides by: the relative gap, and how many samples are undecided."""
    return _program("one_round", _rows(data), size=size, config=config, precise=precise)(data, state, target)


def certified(data: Data, state: SolverState, *, config: SolverConfig) -> Answer:
    """The coefficients of a state with their certificate."""
    return _program("certified", _rows(data), config=config)(data, state)
