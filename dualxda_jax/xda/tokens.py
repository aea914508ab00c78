"""Data that are whole numbers (tokens): relevance starts at what is looked up with them.

A token has no scale that relevance could be a share of. What the network sees of it is a row of an embedding table, and
the relevance of a token is the sum over that row.
"""

import math

import jax.numpy as jnp

from dualxda_jax.types import Array
from dualxda_jax.xda.graph import Atom, Equation, Graph, NoRuleError, Trace, Value

# What indexing does to indices on their way to the table: entry by entry, none added and none moved.
# fmt: off
_INDEXING = frozenset([
    "lt", "ge", "gt", "le", "add", "sub", "select_n", "clamp", "max", "min", "rem", "convert_element_type", "copy",
    "copy_p", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "stop_gradient",
])
# fmt: on


def is_tokens(data: Value | Array) -> bool:
    """Whether data are whole numbers."""
    return jnp.issubdtype(data.dtype if isinstance(data, Array) else data.aval.dtype, jnp.integer)


def sources(traced: Trace, reached: set[Atom], producer: dict[Value, Equation]) -> tuple[Value, ...]:
    """The values at which relevance is wanted.

    Args:
        traced: the function.
        reached: values that depend on the data.
        producer: the equation that computes a value.

    Returns:
        The data, or every embedding of data that are whole numbers.

    Raises:
        NoRuleError: there is none.
    """
    data = traced.inputs[-1]
    if not is_tokens(data):
        return (data,)
    found = [e.outputs[0] for e in traced.equations if _looks_up(e, data, reached, producer)]
    if not found:
        raise NoRuleError(
            f"x: got dtype {data.aval.dtype}, must be floating, since relevance needs a scale; or tokens that the "
            "function looks up, entry by entry, in a table of parameters (table[x], jnp.take, one_hot(x) @ table)"
        )
    return tuple(found)


def _looks_up(equation: Equation, data: Value, reached: set[Atom], producer: dict[Value, Equation]) -> bool:
    output = equation.outputs[0].aval
    if not jnp.issubdtype(output.dtype, jnp.inexact):
        return False
    if equation.name == "gather":
        table, index = equation.inputs
        rows = math.prod(index.aval.shape[:-1]) == data.aval.size
        return table not in reached and rows and _indexes(index, data, reached, producer)
    if equation.name != "dot_general":
        return False
    # one_hot(x) @ table
    hot = [a for a in equation.inputs if a in reached]
    if len(hot) != 1 or output.shape[:-1] != data.aval.shape:
        return False
    made = _behind(hot[0], "convert_element_type", producer)
    compared = _behind(made.inputs[0], "eq", producer) if made else None
    if compared is None:
        return False
    return all(_indexes(a, data, reached, producer) for a in compared.inputs if a in reached)


def _behind(atom: Atom, name: str, producer: dict[Value, Equation]) -> Equation | None:
    equation = producer.get(atom) if isinstance(atom, Value) else None
    return equation if equation is not None and equation.name == name else None


def _indexes(atom: Atom, data: Value, reached: set[Atom], producer: dict[Value, Equation]) -> bool:
    """Whether it is the data, entry for entry, but for what indexing does to them."""
    if atom is data or atom not in reached:
        return True
    assert isinstance(atom, Value)
    made = producer.get(atom)
    if made is None or made.name not in _INDEXING or atom.aval.size != data.aval.size:
        return False
    return all(_indexes(a, data, reached, producer) for a in made.inputs)


def of_each(graph: Graph, source: Value, relevance: Array) -> Array:
    """The relevance of every token: that of its row in one looked-up table.

    Args:
        graph: the function.
        source: one of its sources.
        relevance: shaped like the source.

    Returns:
        Array shaped like the data.
    """
    equation = graph.producer[source]
    looked_up = equation.name == "gather"
    row = tuple(equation.params["dimension_numbers"].offset_dims) if looked_up else (relevance.ndim - 1,)
    return relevance.sum(axis=row).reshape(graph.data.aval.shape)
