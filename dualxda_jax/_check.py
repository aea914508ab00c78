"""One clear error for bad input: it names the argument, what it was and what it must be."""

from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np


def fail(argument: str, was: Any, must: str) -> NoReturn:
    """Raise the ValueError that all rooms share."""
    raise ValueError(f"{argument}: got {was}, must be {must}")


def is_traced(*trees: Any) -> bool:
    """True if any leaf is a tracer, so that its values cannot be looked at."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def shape(argument: str, array: Any, expected: Sequence[int | str]) -> None:
    """Check an array's shape.

    Args:
        argument: the name that the user knows.
        array: anything with a shape.
        expected: one entry a dimension; an int must match, a letter stands for any size.

    Raises:
        ValueError: another number of dimensions or another size.
    """
    got = tuple(np.shape(array))
    fits = len(got) == len(expected) and all(isinstance(e, str) or g == e for g, e in zip(got, expected, strict=True))
    if not fits:
        fail(argument, f"shape {got}", f"[{', '.join(str(e) for e in expected)}]")


def integers(argument: str, array: Any) -> None:
    """Check that an array holds integers (bool does not count)."""
    dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
    if not np.issubdtype(dtype, np.integer):
        fail(argument, f"dtype {dtype}", "integers")


def numbers(argument: str, array: Any, *, or_bool: bool = False) -> None:
    """Check that an array holds real numbers; bool counts only where told."""
    dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
    kinds = (jnp.floating, jnp.integer, jnp.bool_) if or_bool else (jnp.floating, jnp.integer)
    if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        fail(argument, f"dtype {dtype}", "real numbers")


def is_whole(value: Any) -> bool:
    """Whether a value is an integer of Python or NumPy (bool does not count)."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether a value is a finite number of Python or NumPy (bool does not count)."""
    known = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return known and bool(np.isfinite(value))


def within(argument: str, value: Any, low: float, high: float, must: str) -> None:
    """Check that a setting is a number in low..high; NaN and what is no number are not."""
    try:
        inside = bool(low <= value <= high)
    except TypeError:
        inside = False
    if not inside:
        fail(argument, repr(value) if isinstance(value, str) else value, must)


def positive_integer(argument: str, value: Any, *, or_none: bool = False) -> None:
    """Check that a setting is an integer of 1 or more (bool does not count); or None, where told."""
    if value is None and or_none:
        return
    if not is_whole(value) or value < 1:
        fail(argument, value, "an integer, 1 or more" + (", or None" if or_none else ""))


def floating_name(argument: str, dtype: Any) -> str:
    """Name of a floating type, which may be given in any way that NumPy takes."""
    must = "float32, bfloat16 or another floating type"
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        fail(argument, repr(dtype), must)
    if not jnp.issubdtype(found, jnp.floating):
        fail(argument, found.name, must)
    return found.name


def key(argument: str, value: Any, *, many: int | None = None) -> None:
    """Check that a value is a typed key; or, where `many` is given, that many of them."""
    if not (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
        fail(argument, type(value).__name__, "a typed key, as from jax.random.key")
    if value.shape not in ((), () if many is None else (many,)):
        fail(argument, f"shape {value.shape}", "one key" + ("" if many is None else f", or [{many}]"))


def rows_not_finite(array: Any) -> np.ndarray:
    """Places of the rows that hold NaN or Inf; it looks at all values, so ask only where something went wrong."""
    values = np.asarray(array)
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return np.zeros(0, int)
    return np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))


def elsewhere(values: Any) -> bool:
    """Whether a part of an array is on devices of other processes, so that it cannot be looked at here."""
    return isinstance(values, jax.Array) and not values.is_fully_addressable and not values.is_fully_replicated


def class_range(argument: str, values: Any, num_classes: int) -> None:
    """Check that concrete labels lie in 0..k-1; does nothing inside a trace, where values are unknown."""
    if is_traced(values):
        return
    if elsewhere(values):
        # Every process comes to the same end.
        least, most = int(jnp.min(values)), int(jnp.max(values))
        if least < 0 or most >= num_classes:
            fail(argument, f"values from {least} to {most}", f"in 0..{num_classes - 1}")
        return
    values = np.asarray(values)
    if values.size and (values.min() < 0 or values.max() >= num_classes):
        bad = values[(values < 0) | (values >= num_classes)]
        first = int(np.flatnonzero((values < 0) | (values >= num_classes))[0])
        fail(argument, f"{int(bad[0])} at position {first} ({bad.size} outside)", f"in 0..{num_classes - 1}")
