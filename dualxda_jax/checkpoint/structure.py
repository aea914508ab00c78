"""The structure of a pytree as JSON, apart from the arrays that it holds, and back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import types
from dualxda_jax.checkpoint.content import CheckpointError, to_numpy


def encode(tree: Any, arrays: list[np.ndarray], where: str) -> Any:
    """The structure as JSON; appends the arrays in the order in which they are met."""
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"plain": type(tree).__name__, "value": tree}
    if type(tree) is dict and all(isinstance(key, str | int) for key in tree):
        return {"dict": [[key, encode(tree[key], arrays, f"{where}[{key!r}]")] for key in tree]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [encode(item, arrays, f"{where}[{i}]") for i, item in enumerate(tree)]}
    if dataclasses.is_dataclass(tree) and getattr(types, type(tree).__name__, None) is type(tree):
        fields = dataclasses.fields(tree)
        return {
            "dataclass": type(tree).__name__,
            "fields": [[f.name, encode(getattr(tree, f.name), arrays, f"{where}.{f.name}")] for f in fields],
            "static": [f.name for f in fields if f.metadata.get("static")],
        }
    if isinstance(tree, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        if isinstance(tree, np.ndarray | np.generic) and (tree.dtype.kind in "OSUMm" or tree.dtype.type is np.void):
            raise CheckpointError(f"{where}: an array of {tree.dtype.name} cannot be stored, only those of numbers")
        return _encode_array(tree, arrays)
    if jax.tree_util.all_leaves([tree]):
        raise CheckpointError(f"{where}: a {type(tree).__name__} cannot be stored, only arrays and plain values")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [[jax.tree_util.keystr(key), encode(leaf, arrays, f"{where}.leaf")] for key, leaf in leaves]
    return {"pytree": type(tree).__name__, "leaves": named}


def _encode_array(leaf: Any, arrays: list[np.ndarray]) -> dict[str, Any]:
    kind = "numpy" if isinstance(leaf, np.ndarray | np.generic) else "jax"
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return {"array": -1, "kind": kind, "dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    impl, array = to_numpy(leaf)
    arrays.append(array)
    encoded = {"array": len(arrays) - 1, "kind": kind, "dtype": str(leaf.dtype), "shape": list(np.shape(leaf))}
    return encoded | {"impl": impl, "data": [array.dtype.name, list(array.shape)]}


def difference(saved: Any, expected: Any, where: str) -> str:
    """The first place in which two structures differ, or nothing."""
    names = [key for key in ("array", "plain", "dict", "list", "tuple", "dataclass", "pytree") if key in saved]
    kind = names[0]
    if kind not in expected:
        other = next(iter(expected))
        return f"{where} is saved as {kind}, `like` has {other}"
    if kind == "array":
        mine, theirs = ((s["dtype"], s["shape"]) for s in (saved, expected))
        return "" if mine == theirs else f"{where} is saved as {mine[0]}{mine[1]}, `like` has {theirs[0]}{theirs[1]}"
    if kind == "plain":
        same = saved["plain"] == expected["plain"]
        return "" if same else f"{where} is saved as {saved['plain']}, `like` has {expected['plain']}"
    if kind in ("dataclass", "pytree") and saved[kind] != expected[kind]:
        return f"{where} is saved as {saved[kind]}, `like` has {expected[kind]}"
    ours, others = _children(saved, kind), _children(expected, kind)
    if sorted(ours, key=str) != sorted(others, key=str):
        return f"{where} is saved with {list(ours)}, `like` has {list(others)}"
    for name in saved.get("static", ()):
        if ours[name]["value"] != others[name]["value"]:
            return f"{where}.{name} is saved as {ours[name]['value']}, `like` has {others[name]['value']}"
    found = (difference(ours[name], others[name], f"{where}[{name!r}]") for name in ours)
    return next((text for text in found if text), "")


def _children(node: Any, kind: str) -> dict[Any, Any]:
    entries = node[{"dataclass": "fields", "pytree": "leaves"}.get(kind, kind)]
    return dict(enumerate(entries)) if kind in ("list", "tuple") else dict(entries)


def decode(node: Any, arrays: list[np.ndarray], like: Any) -> Any:
    """The pytree that `encode` described, around its arrays."""
    if "array" in node:
        return _decode_array(node, arrays[node["array"]], like)
    if "plain" in node:
        return node["value"]
    if "dict" in node:
        return {key: decode(child, arrays, None if like is None else like[key]) for key, child in node["dict"]}
    for kind in (list, tuple):
        if kind.__name__ in node:
            items = node[kind.__name__]
            return kind(decode(item, arrays, None if like is None else like[i]) for i, item in enumerate(items))
    if "dataclass" in node:
        children = {f: decode(c, arrays, None if like is None else getattr(like, f)) for f, c in node["fields"]}
        return getattr(types, node["dataclass"])(**children)
    if like is None:
        raise CheckpointError(f"holds a {node['pytree']}, a type that only `like` can tell")
    leaves, structure = jax.tree.flatten(like)
    decoded = [decode(child, arrays, leaf) for (_, child), leaf in zip(node["leaves"], leaves, strict=True)]
    return jax.tree.unflatten(structure, decoded)


def _decode_array(node: Any, array: np.ndarray, like: Any) -> Any:
    if node["kind"] == "numpy":
        return array
    if array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
        raise CheckpointError(f"holds {array.dtype.name} arrays of JAX, which need jax_enable_x64")
    value = jnp.asarray(array)
    if node["impl"]:
        value = jax.random.wrap_key_data(value, impl=node["impl"])
    sharding = getattr(like, "sharding", None)
    return value if sharding is None else jax.device_put(value, sharding)


def array_nodes(node: Any, nodes: list[Any]) -> None:
    """Fill in the descriptions of the arrays, each at its number."""
    if isinstance(node, dict) and "array" in node:
        nodes[node["array"]] = node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            array_nodes(child, nodes)
