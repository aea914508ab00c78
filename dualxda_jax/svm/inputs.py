"""What the solver accepts: checks before anything is traced, and one form for all that passes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.types import DualSolution

Array = jax.Array


def result_dtype(features: Any) -> Any:
    """float64 for float64 features, else float32; for arrays of NumPy it matters whether x64 is on."""
    dtype = features.dtype
    if isinstance(features, np.ndarray):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def in_trace(*trees: Any) -> bool:
    """Whether values cannot be looked at, because they are traced or because a trace is under way around them."""
    return _check.is_traced(*trees) or isinstance(jax.device_put(np.zeros(())), jax.core.Tracer)


def device_limit(config: SolverConfig) -> int | None:
    """Bytes of features that may be on the device; None if there is no limit."""
    if config.device_bytes is not None:
        return config.device_bytes
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["bytes_limit"] // 2 if "bytes_limit" in stats else None


def stays_on_host(features: Any, config: SolverConfig) -> bool:
    """Whether features are to pass through the device in parts."""
    if not isinstance(features, np.ndarray) or in_trace():
        return False
    limit = device_limit(config)
    return limit is not None and features.nbytes > limit


def prepare(
    features: Any, labels: Any, num_classes: int, cost: Any, sample_weight: Any, config: SolverConfig
) -> tuple[Array, Array, Array]:
    """Check everything and return features, int32 labels and the cost of every sample."""
    if not isinstance(config, SolverConfig):
        _check.fail("config", repr(config), "a svm.SolverConfig")
    if not hasattr(features, "dtype"):
        features = np.asarray(features)
    if not jnp.issubdtype(features.dtype, jnp.floating):
        _check.fail("features", f"dtype {features.dtype}", "floating point")
    _check.shape("features", features, ["n", "d"])
    _check_varying(features=features, labels=labels, cost=cost, sample_weight=sample_weight)
    n = features.shape[0]
    if n == 0:
        _check.fail("features", "no rows", "[n, d] with n of 1 or more")
    if features.shape[1] == 0:
        _check.fail("features", "no columns", "[n, d] with d of 1 or more")
    if not isinstance(num_classes, (int, np.integer)) or num_classes < 2:
        _check.fail("num_classes", num_classes, "an integer of 2 or more")
    _check.shape("labels", labels, [n])
    _check.integers("labels", labels)
    _check.class_range("labels", labels, num_classes)
    dtype = result_dtype(features)
    _check_costs("cost", cost, n, dtype, scalar=True)
    if sample_weight is not None:
        _check_costs("sample_weight", sample_weight, n, dtype, scalar=False)
    if not _check.is_traced(features):
        _check_finite(features)
    if not (stays_on_host(features, config) and not _check.is_traced(labels, cost, sample_weight)):
        features = _on_device(features)
    if in_trace(features, labels, cost, sample_weight) or _check.elsewhere(cost) or _check.elsewhere(sample_weight):
        costs = jnp.broadcast_to(_as(cost, dtype), (n,))
        costs = costs if sample_weight is None else costs * _as(sample_weight, dtype)
    else:
        # By NumPy, which has nothing to compile.
        plain = np.broadcast_to(np.asarray(cost).astype(dtype), (n,))
        # What overflows is refused by name below.
        with np.errstate(over="ignore", under="ignore"):
            plain = plain if sample_weight is None else plain * np.asarray(sample_weight).astype(dtype)
        costs = _on_device(plain)
    known = not (_check.is_traced(cost, sample_weight) or _check.elsewhere(cost) or _check.elsewhere(sample_weight))
    if sample_weight is not None and known:
        _check_range("sample_weight times cost", np.asarray(cost, np.float64) * np.asarray(sample_weight), dtype)
    if not isinstance(labels, jax.Array):
        labels = _on_device(np.asarray(labels).astype(np.int32))
    if _check.is_traced(labels, costs):
        # What could not be looked at above must not end as an answer: it ends as NaN and not converged.
        possible = (labels >= 0) & (labels < num_classes) & (costs >= 0.0)
        costs = jnp.where(possible, costs, jnp.nan)
    return features, labels if labels.dtype == jnp.int32 else labels.astype(jnp.int32), costs


def _on_device(values: Any) -> Array:
    """An array on the default device; NumPy is handed over without a program."""
    if isinstance(values, jax.Array) or in_trace():
        return jnp.asarray(values)
    values = np.asarray(values)
    return jax.device_put(values.astype(jax.dtypes.canonicalize_dtype(values.dtype)))


def _check_varying(**given: Any) -> None:
    """Refuse what `shard_map` with `check_vma=True` passes: the loops of a solve do not say over what they vary."""
    for name, value in given.items():
        kind: Any = jax.typeof(value) if isinstance(value, jax.core.Tracer) else None
        # By either of the names that versions of jax have for them.
        axes = getattr(kind, "vma", None) or getattr(getattr(kind, "manual_axis_type", None), "varying", None)
        if axes:
            over = f"values that vary over the mesh axes {', '.join(sorted(map(str, axes)))}"
            _check.fail(name, over, "inside of a jax.shard_map with check_vma=False")


def _check_costs(name: str, values: Any, n: int, dtype: Any, *, scalar: bool) -> None:
    shape = np.shape(values)
    # A mask is a weight, too.
    _check.numbers(name, values, or_bool=not scalar)
    if shape != (n,) and not (scalar and shape == ()):
        _check.fail(name, f"shape {shape}", f"a scalar or [{n}]" if scalar else f"[{n}]")
    if _check.is_traced(values):
        return
    if _check.elsewhere(values):
        if not bool(jnp.all(jnp.isfinite(values) & (values >= 0))):
            _check.fail(name, "some that are not", "finite and 0 or more")
        return
    values = np.asarray(values, np.float64)
    wrong = ~np.isfinite(values) | (values < 0.0)
    if wrong.any():
        _check.fail(name, f"{values[wrong].flat[0]} ({int(wrong.sum())} such values)", "finite and 0 or more")
    if shape == () and values == 0.0:
        _check.fail(name, "0", "above 0 (a cost per sample may be 0)")
    _check_range(name, values, dtype)


def _check_range(name: str, values: Any, dtype: Any) -> None:
    """Refuse what the dtype rounds to nothing or to infinity: it would end as an empty answer, or as none."""
    limits, largest = jnp.finfo(dtype), np.max(values)
    if 0.0 < largest < limits.tiny or largest > limits.max:
        _check.fail(name, f"{largest:.3g}", f"within {limits.dtype}, {limits.tiny:.1e} to {limits.max:.1e}")


def _as(values: Any, dtype: Any) -> Array:
    """An array in a floating dtype; large integers of NumPy and Python would wrap if they became jax arrays first."""
    return values.astype(dtype) if isinstance(values, jax.Array) else jnp.asarray(np.asarray(values).astype(dtype))


def smoothing_of(value: Any) -> Any:
    """γ as the solver takes it: None for a known 0."""
    if np.shape(value) != ():
        _check.fail("smoothing", f"shape {np.shape(value)}", "a scalar")
    _check.numbers("smoothing", value)
    if _check.is_traced(value):
        value = value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.float32)
        return jnp.where(value >= 0.0, value, jnp.nan)
    number = float(value)
    if not (np.isfinite(number) and number >= 0.0):
        _check.fail("smoothing", number, "0 or more and finite")
    return None if number == 0.0 else np.float64(number)


@jax.jit
def _all_finite(features: Array) -> Array:
    return jnp.all(jnp.isfinite(features))


def _surely_finite(features: Any) -> bool:
    """True if all features are finite; False where that takes a closer look."""
    if not isinstance(features, jax.Array) or in_trace():
        return False
    if (
        len(features.devices()) > 1
        or next(iter(features.devices())).platform != "cpu"
        or features.dtype == jnp.bfloat16
    ):
        return bool(_all_finite(features))
    # A sum is finite only where all its terms are, and NumPy has nothing to compile for it.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.asarray(features).sum()))


def _check_finite(features: Any) -> None:
    if _surely_finite(features):
        return
    if _check.elsewhere(features):
        _check.fail("features", "NaN or Inf in some rows", "finite")
    # NumPy, so that concrete features inside somebody's trace can be looked at as well.
    values = np.asarray(features)
    parts = [values[i : i + 65536].astype(np.float32) for i in range(0, len(values), 65536)]
    rows = np.concatenate([np.isfinite(part).all(axis=1) for part in parts])
    if not rows.all():
        bad = np.flatnonzero(~rows)
        first = ", ".join(str(i) for i in bad[:5])
        _check.fail("features", f"NaN or Inf in {bad.size} of {rows.size} rows, first in rows {first}", "finite")


class Start(NamedTuple):
    """Where to start from: dual variables [n, k], and weights [k, D] with the constant feature's column last."""

    coefficients: Array
    weights: Array


def start_of(start: DualSolution | None, features: Array, num_classes: int, scaling: float) -> Start | None:
    """What a solution gives to start from; rows that it does not know have no say yet."""
    if start is None:
        return None
    if not isinstance(start, DualSolution):
        _check.fail("init", type(start).__name__, "a DualSolution, as svm.solve returns it")
    (n, d), dtype = features.shape, result_dtype(features)
    coefficients = start.coefficients
    if coefficients.ndim != 2 or coefficients.shape[0] > n or coefficients.shape[1] != num_classes:
        _check.fail("init.coefficients", f"shape {coefficients.shape}", f"at most {n} rows of {num_classes}")
    _check.shape("init.weights", start.weights, (num_classes, d))
    weights = start.weights.astype(dtype)
    if scaling != 0.0:
        weights = jnp.concatenate([weights, start.intercept.astype(dtype)[:, None] / scaling], axis=1)
    return Start(jnp.pad(coefficients.astype(dtype), ((0, n - coefficients.shape[0]), (0, 0))), weights)
