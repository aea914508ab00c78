"""Which parameters take part in a method: a filter on their paths, and the split that gradients are taken through."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dualxda_jax import _check
from dualxda_jax.types import Array, Params

Filter = str | tuple[str, ...]
"""What `select` takes: "all", "head", a shell pattern on paths ("encoder/*/kernel"), or several of them."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The chosen leaves of one kind of parameter tree; static and hashable.

    Attributes:
        names: path of every leaf, in the order of `jax.tree.leaves`.
        chosen: for every leaf, whether it takes part.
        structure: the tree's structure.
    """

    names: tuple[str, ...]
    chosen: tuple[bool, ...]
    structure: Any

    def split(self, params: Params) -> tuple[dict[str, Array], tuple[Array, ...]]:
        """Chosen leaves by path, and all others.

        Raises:
            ValueError: parameters of another structure.
        """
        leaves, structure = jax.tree.flatten(params)
        if structure != self.structure:
            _check.fail("params", f"the structure {structure}", f"that of the network's parameters, {self.structure}")
        found = {name: leaf for name, leaf, take in zip(self.names, leaves, self.chosen, strict=True) if take}
        return found, tuple(leaf for leaf, take in zip(leaves, self.chosen, strict=True) if not take)

    def merge(self, chosen: Mapping[str, Any], rest: tuple[Any, ...]) -> Params:
        """The whole tree from what `split` gave; the chosen leaves may be any others of the same shapes."""
        others = iter(rest)
        leaves = [chosen[n] if take else next(others) for n, take in zip(self.names, self.chosen, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)


def paths(params: Params) -> tuple[str, ...]:
    """Path of every leaf as "encoder/dense_0/kernel", in the order of `jax.tree.leaves`.

    Flax's top level "params" and the "value" that boxes add are left out; other collections keep their name, as
    "batch_stats/norm/mean".
    """
    found = []
    for keys, _ in jax.tree_util.tree_leaves_with_path(params):
        parts = [jax.tree_util.keystr((key,), simple=True, separator="/") for key in keys]
        parts = parts[1:] if parts[:1] == ["params"] else parts
        found.append("/".join(parts[:-1] if len(parts) > 1 and parts[-1] == "value" else parts))
    return tuple(found)


def select(params: Params, which: Filter, *, head: str | None = None) -> Selection:
    """Choose parameters by their paths.

    Only parameters can be chosen: floating-point leaves, of the collection "params" where linen's collections are
    given, of type `nnx.Param` in an `nnx.State`.

    Args:
        params: what the network takes.
        which: "all"; "head" for the layer at `head`; or a shell pattern as "dense_*" or "encoder/*/kernel" ("*" also
            crosses "/"), which chooses the leaves whose path it matches and all leaves below a layer that it matches;
            or a tuple of any of these.
        head: path of the final linear layer, as in `Context.head`.

    Raises:
        ValueError: no parameter matches.
    """
    names, structure = paths(params), jax.tree.structure(params)
    able = _trainable(params)
    patterns = (which,) if isinstance(which, str) else tuple(which)
    chosen = [False] * len(names)
    for pattern in patterns:
        glob = head.replace(".", "/") if pattern == "head" and head is not None else pattern
        hits = [ok and _matches(name, glob) for name, ok in zip(names, able, strict=True)]
        if not any(hits):
            known = ", ".join(name for name, ok in zip(names, able, strict=True) if ok)
            _check.fail("params", repr(pattern), f'"all", "head" or a pattern that matches one of: {known}')
        chosen = [a or b for a, b in zip(chosen, hits, strict=True)]
    if not any(chosen):
        _check.fail("params", repr(which), '"all", "head" or a pattern')
    twice = sorted({n for n, take in zip(names, chosen, strict=True) if take and names.count(n) > 1})
    if twice:
        _check.fail("params", f"several leaves at the path {twice[0]!r}", "a tree with one leaf at every path")
    return Selection(names, tuple(chosen), structure)


def _matches(name: str, pattern: str) -> bool:
    return pattern == "all" or fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}/*")


def _trainable(params: Params) -> list[bool]:
    """For every leaf, whether it is a parameter and no statistic."""
    variables = jax.tree.leaves(params, is_leaf=_is_variable)
    kinds = [not _is_variable(v) or isinstance(v, nnx.Param) for v in variables for _ in jax.tree.leaves(v)]
    collections = isinstance(params, Mapping) and "params" in params
    keys = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    tops = [not collections or jax.tree_util.keystr(path[:1], simple=True) == "params" for path in keys]
    floats = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in jax.tree.leaves(params)]
    return [all(facts) for facts in zip(kinds, tops, floats, strict=True)]


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
