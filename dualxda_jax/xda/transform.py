"""Relevance propagation as a function transformation: the same outputs with a modified gradient."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.types import Array
from dualxda_jax.xda import plan, reach, walk
from dualxda_jax.xda.composites import Composite


def lrp(fn: Callable[[Array], Any], *, composite: Composite) -> Callable[[Array], Any]:
    """Give a function the modified gradient of a composite: input × gradient is then its relevance.

    Args:
        fn: a function of the input alone (close over parameters, or use functools.partial), with array outputs.
        composite: which rule goes to which layer.

    Returns:
        A function with fn's outputs. `x * jax.grad(lambda x: lrp(fn)(x)[i])(x)` is the relevance of output i. It is
        traced anew at every call outside of jit. The modified gradient is one with respect to the input: to a linear
        layer's rule its weights are constants, so differentiate fn itself by its parameters. Derivatives of the
        relevance by the parameters are exact.

    Raises:
        ValueError: fn is no function, or the composite's first-layer rule puts relevance where the input is zero (flat,
            w², z-box).
        NoRuleError: when called, if fn contains an operation that relevance cannot pass.
    """
    check_callable("fn", fn)
    check_composite(composite)
    if not composite.differentiable:
        _check.fail(
            "composite",
            f"{composite.name}, whose first layer has the rule {composite.first}",
            "one whose relevance is input times modified gradient; use xda.relevance for this one",
        )

    def transformed(x: Array) -> Any:
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            _check.fail("x", f"dtype {jnp.result_type(x)}", "floating: it has a gradient; for tokens see xda.relevance")
        inner, parameters = _split_parameters(fn)
        traced = reach.build(inner, parameters, x)
        planned = plan.make(traced, composite, seeded=False)
        outputs = walk.run(planned, [*jax.tree.leaves(parameters), x])
        return jax.tree.unflatten(traced.out_tree, outputs)

    return transformed


def _split_parameters(fn: Callable[[Array], Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """See a functools.partial over pytrees of arrays as a function of these and the data: then paths are known."""
    if not isinstance(fn, functools.partial) or fn.keywords:
        return fn, ()
    arrays = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(fn.args))
    return (fn.func, fn.args) if arrays else (fn, ())


def check_callable(argument: str, fn: Any) -> None:
    """Refuse what cannot be called, as a module in place of its `apply`."""
    if not callable(fn):
        _check.fail(argument, type(fn).__name__, "a function")


def check_composite(composite: Any) -> None:
    """Refuse anything that is not a composite, with a hint where a factory was not called."""
    if not isinstance(composite, Composite):
        was = f"the function {composite.__name__}" if callable(composite) else repr(composite)
        _check.fail("composite", was, "a Composite, as xda.composites.epsilon_plus() returns")
