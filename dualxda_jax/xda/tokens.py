"""Data that are whole numbers (tokens): relevance starts at what is looked up with them.

A token has no scale that relevance could be a share of. What the network sees of it is a row of an embedding table, and
the relevance of a token is the sum over the rows that it looks up. On their way to the table tokens may be sliced,
reversed, gathered, padded or replaced: which token an index came from is computed beside the index itself, by the same
operations on the tokens' places.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from dualxda_jax.types import Array
from dualxda_jax.xda import _compat
from dualxda_jax.xda.graph import Atom, Constant, Equation, Graph, NoRuleError, Trace, Value

# What happens to indices on their way to the table: each entry by itself, or entries moved about.
# fmt: off
_ENTRYWISE = frozenset([
    "lt", "ge", "gt", "le", "eq", "ne", "add", "sub", "mul", "clamp", "max", "min", "rem", "convert_element_type",
    "copy", "copy_p", "stop_gradient",
])
_MOVES = frozenset([
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "rev", "slice", "split", "pad", "concatenate",
    "stack", "tile", "gather", "dynamic_slice", "dynamic_update_slice", "select_n",
])
# fmt: on
_NOWHERE = -1


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
    top = frozenset(traced.equations)
    found = []
    for equation in traced.equations:
        index = _index(equation, reached, producer)
        if index is not None and _traceable(index, data, reached, producer, top):
            found.append(equation.outputs[0])
    if not found:
        raise NoRuleError(
            f"x: got dtype {data.aval.dtype}, must be floating, since relevance needs a scale; or tokens that the "
            "function looks up, one by one, in a table of parameters (table[x], jnp.take, one_hot(x) @ table)"
        )
    return tuple(found)


def _index(equation: Equation, reached: Any, producer: dict[Value, Equation]) -> Atom | None:
    """What an equation looks rows of a table of parameters up with, or None if it does no such thing."""
    if not jnp.issubdtype(equation.outputs[0].aval.dtype, jnp.inexact):
        return None
    if equation.name == "gather":
        table, index = equation.inputs
        return index if table not in reached and index.aval.shape[-1] == 1 else None
    if equation.name != "dot_general" or equation.inputs[0] not in reached or equation.inputs[1] in reached:
        return None
    # one_hot(x) @ table
    hot = equation.inputs[0]
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    made = _behind(hot, "convert_element_type", producer)
    compared = _behind(made.inputs[0], "eq", producer) if made else None
    if compared is None or batch or tuple(contracted) != (hot.aval.ndim - 1,):
        return None
    indices = [a for a in compared.inputs if a in reached]
    same = [a.aval.shape[:-1] for a in indices] == [equation.outputs[0].aval.shape[:-1]]
    return indices[0] if same else None


def _behind(atom: Atom, name: str, producer: dict[Value, Equation]) -> Equation | None:
    equation = producer.get(atom) if isinstance(atom, Value) else None
    return equation if equation is not None and equation.name == name else None


def _carriers(equation: Equation) -> Sequence[Atom]:
    """The inputs of which the output's entries are made; the others decide which."""
    if equation.name == "select_n":
        return equation.inputs[1:]
    if equation.name in ("gather", "dynamic_slice"):
        return equation.inputs[:1]
    return equation.inputs[:2] if equation.name == "dynamic_update_slice" else equation.inputs


def _traceable(
    atom: Atom, data: Value, reached: set[Atom], producer: dict[Value, Equation], top: frozenset[Equation]
) -> bool:
    """Whether every entry of it comes from one token, or from none."""

    def root(atom: Atom) -> Any:
        """None if free of the data; or what it is entry by entry; or False where entries mix."""
        if atom is data or atom not in reached:
            return data if atom is data else None
        made = producer.get(atom) if isinstance(atom, Value) else None
        if made is None or made not in top or made.name not in _ENTRYWISE | _MOVES:
            return False
        found = {root(a) for a in _carriers(made)} - {None}
        if False in found:
            return False
        if made.name in _MOVES:
            # Wrapping negative indices chooses between a value and a shift of it: still the same entry.
            same = made.name == "select_n" and len(found) == 1
            return found.pop() if same else atom if found else None
        return found.pop() if len(found) == 1 else False

    return root(atom) not in (None, False)


def of_each(graph: Graph, source: Value, relevance: Array, inputs: Sequence[Array]) -> Array:
    """The relevance of every token: that of its row in one looked-up table.

    Args:
        graph: the function.
        source: one of its sources.
        relevance: shaped like the source.
        inputs: of the graph, flat.

    Returns:
        Array shaped like the data.
    """
    equation = graph.producer[source]
    looked_up = equation.name == "gather"
    row = tuple(equation.params["dimension_numbers"].offset_dims) if looked_up else (relevance.ndim - 1,)
    index = _index(equation, graph.reached, graph.producer)
    assert index is not None
    places = _places(graph, index, inputs)[..., 0].reshape(-1)
    sums = relevance.sum(axis=row).reshape(-1)
    shape = graph.data.aval.shape
    # What came from no token lands behind the last and is cut off.
    total = jnp.zeros(graph.data.aval.size + 1, sums.dtype)
    return total.at[jnp.where(places < 0, graph.data.aval.size, places)].add(sums)[:-1].reshape(shape)


def _places(graph: Graph, atom: Atom, inputs: Sequence[Array]) -> Array:
    """From which token, counted along the flat data, every entry of an index came; negative where from none."""
    values: dict[Value, Any] = {**dict(zip(graph.inputs, inputs, strict=True)), **graph.constants}
    places: dict[Value, Array] = {graph.data: jnp.arange(graph.data.aval.size).reshape(graph.data.aval.shape)}
    integer = places[graph.data].dtype

    def value(atom: Atom) -> Any:
        if isinstance(atom, Constant):
            return atom.value
        if atom not in values:
            made = graph.producer[atom]
            values.update(zip(made.outputs, _compat.bind(made.source, [value(a) for a in made.inputs]), strict=True))
        return values[atom]

    def place(atom: Atom) -> Array:
        if isinstance(atom, Constant) or graph.is_fixed(atom):
            return jnp.full(atom.aval.shape, _NOWHERE, integer)
        if atom in places:
            return places[atom]
        made = graph.producer[atom]
        if made.name in _ENTRYWISE:
            live = next(a for a in made.inputs if not graph.is_fixed(a))
            found = (jnp.broadcast_to(place(live), atom.aval.shape),)
        else:
            carriers = _carriers(made)
            found = _compat.bind(made.source, [place(a) if a in carriers else value(a) for a in made.inputs])
        places.update(zip(made.outputs, found, strict=True))
        return places[atom]

    return place(atom)
