"""From any Flax module and the name of its final linear layer to a feature function; the module stays as it is."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from dualxda_jax._check import fail
from dualxda_jax.types import Array, FeatureModel, Params

# The head's input travels out in a collection (linen) or a variable type (nnx) of its own, because Flax hands those
# through its lifted transforms (remat, jit); a Python list would catch a tracer of the inner trace.
_COLLECTION = "dualxda_head_input"


class _HeadInput(nnx.Intermediate):
    """The variable that carries the head's input out of an nnx module."""


def from_linen(module: nn.Module, *, head: str, call_kwargs: Mapping[str, Any] | None = None) -> FeatureModel:
    """See a linen module as features and a linear head.

    The functions take as `params` what `module.init` returned (all collections: "params", "batch_stats", …), or the
    bare "params" collection. A dict with the key "params" counts as the first. Nothing is mutated: BatchNorm must run
    on its running statistics, which is up to the module's default or `call_kwargs`.

    Args:
        module: any linen module with one array as input; not changed, not asked to change.
        head: path of the final Dense layer, as in the parameters: "head", "decoder/head" or "decoder.head".
        call_kwargs: more keyword arguments of the module's call, for example {"train": False}.

    Returns:
        FeatureModel; `features` gives the input of the head, `logits` the module's own output. Equal arguments give
        the same functions, so that `jax.jit` compiles them once.

    Raises:
        ValueError: not a linen module; `head` is empty; and when the functions run: there is no such layer, it is not a
            Dense layer, it is called more than once or inside of a transform that hides its input, or its input is not
            [b, d].
    """
    if not isinstance(module, nn.Module):
        fail("module", type(module).__name__, "a flax.linen module")
    path = _split(head)
    items = tuple(sorted((call_kwargs or {}).items()))
    try:
        return _linen_model(module, path, items)
    except TypeError:  # a field or a keyword that cannot be hashed
        return _linen_model.__wrapped__(module, path, items)


@functools.lru_cache(maxsize=64)
def _linen_model(module: nn.Module, path: tuple[str, ...], items: tuple[tuple[str, Any], ...]) -> FeatureModel:
    kwargs = dict(items)
    head = "/".join(path)

    def features(params: Params, x: Array) -> Array:
        called: dict[str, str] = {}

        def record(next_fun: Any, args: Any, kw: Any, context: Any) -> Any:
            layer = context.module
            if context.method_name == "__call__":
                called["/".join(layer.path)] = type(layer).__name__ if not _is_dense(layer) else "Dense"
                if layer.path == path and _is_dense(layer):
                    layer.sow(_COLLECTION, "input", args[0] if args else kw["inputs"])
            return next_fun(*args, **kw)

        with nn.intercept_methods(record):
            _, state = module.apply(_variables(params), x, mutable=[_COLLECTION], **kwargs)
        if head not in called:
            _no_such_layer(head, [name for name, kind in called.items() if kind == "Dense"])
        if called[head] != "Dense":
            fail("head", f"{head!r}, a {called[head]}", "a Dense layer")
        layer = state.get(_COLLECTION, {})
        for name in path:
            layer = layer.get(name, {})
        return _the_input(head, layer.get("input", ()))

    def logits(params: Params, x: Array) -> Array:
        return module.apply(_variables(params), x, **kwargs)  # type: ignore[return-value]

    return FeatureModel(features, logits, head)


def from_nnx(
    module: nnx.Module, *, head: str, call_kwargs: Mapping[str, Any] | None = None
) -> tuple[FeatureModel, Params]:
    """See an nnx module as features and a linear head.

    The module's graph is taken as it is now, set to eval mode in a copy (`BatchNorm`, `Dropout`); the states of random
    number generators stay with the functions, everything else is in the parameters.

    Args:
        module: any nnx module with one array as input; not changed, not asked to change.
        head: path of the final Linear layer: "head", "decoder/head" or "decoder.head", "layers/2" in a list.
        call_kwargs: more keyword arguments of the module's call.

    Returns:
        FeatureModel and its parameters, an `nnx.State`.

    Raises:
        ValueError: not an nnx module; there is no such layer or it is not a Linear layer; and when the functions run:
            it is called more than once or never, or its input is not [b, d].
    """
    if not isinstance(module, nnx.Module):
        fail("module", type(module).__name__, "a flax.nnx module")
    path = _split(head)
    head = "/".join(path)
    kwargs = dict(call_kwargs or {})
    graph, state = nnx.split(module)
    copy = nnx.merge(graph, state)
    copy.eval()
    _find_linear(copy, head)
    graph, random, params = nnx.split(copy, nnx.RngState, ...)  # type: ignore[misc]  # flax: the filters vary

    def features(params: Params, x: Array) -> Array:
        layers = nnx.merge(graph, random, params)
        layer = _find_linear(layers, head)
        # Only the class is exchanged: aliases of the layer and its own attributes keep working.
        layer.__class__ = _recording(type(layer))  # type: ignore[arg-type]
        layers(x, **kwargs)
        found = getattr(layer, _COLLECTION, None)
        return _the_input(head, () if found is None else _value(found))

    def logits(params: Params, x: Array) -> Array:
        return nnx.merge(graph, random, params)(x, **kwargs)

    return FeatureModel(features, logits, head), params


def head_weights(model: FeatureModel, params: Params) -> tuple[Array, Array]:
    """Weights and bias of the final linear layer.

    Args:
        model: from `from_linen` or `from_nnx`.
        params: its parameters.

    Returns:
        weights [k, d] and bias [k] (zeros if the layer has none): logits = features · weightsᵀ + bias.

    Raises:
        ValueError: the parameters hold no such layer, or its kernel is not [d, k].
    """
    layer = params if isinstance(params, nnx.State) else _variables(params)["params"]
    for name in _split(model.head):
        key = name if name in layer else int(name) if name.isdigit() else name
        if key not in layer:
            fail("params", f"no layer {model.head!r}", "the parameters of this model")
        layer = layer[key]
    kernel = _plain(layer["kernel"])
    if kernel.ndim != 2:
        fail("head", f"a kernel of shape {kernel.shape}", "[d, k]")
    bias = _plain(layer["bias"]) if "bias" in layer else None
    return kernel.T, jnp.zeros(kernel.shape[1], kernel.dtype) if bias is None else bias


def _split(head: str) -> tuple[str, ...]:
    path = tuple(head.replace(".", "/").split("/")) if isinstance(head, str) else ()
    if not path or not all(path):
        fail("head", repr(head), 'the path of the final linear layer, as "head" or "decoder/head"')
    return path


def _variables(params: Params) -> Any:
    return params if "params" in params else {"params": params}


def _plain(leaf: Any) -> Any:
    return _value(leaf) if isinstance(leaf, nnx.Variable) else nn.meta.unbox(leaf)


def _value(variable: Any) -> Any:
    # Flax before 0.12.1 has no get_value; later ones warn about .value.
    return variable.get_value() if hasattr(type(variable), "get_value") else variable.value


def _is_dense(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Dense | nn.DenseGeneral)


def _no_such_layer(head: str, layers: list[str]) -> None:
    fail("head", repr(head), f"one of the linear layers of this model: {', '.join(map(repr, layers)) or 'it has none'}")


def _the_input(head: str, inputs: tuple[Array, ...]) -> Array:
    if len(inputs) != 1:
        times = f"called {len(inputs)} times" if inputs else "not called where its input can be seen"
        fail("head", f"{head!r}, {times}", "a linear layer that one forward pass calls once")
    if jnp.ndim(inputs[0]) != 2:
        fail("head", f"{head!r} with an input of shape {jnp.shape(inputs[0])}", "a linear layer with an input [b, d]")
    return inputs[0]


def _find_linear(module: nnx.Module, head: str) -> Any:
    found: Any = module
    for name in head.split("/"):
        try:
            found = (
                found[int(name) if name.isdigit() else name] if hasattr(found, "__getitem__") else getattr(found, name)
            )
        except (AttributeError, KeyError, IndexError, TypeError):
            _no_such_layer(head, ["/".join(map(str, p)) for p, layer in nnx.iter_graph(module) if _is_linear(layer)])
    if not _is_linear(found):
        fail("head", f"{head!r}, a {type(found).__name__}", "a Linear layer")
    return found


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, nnx.Linear | nnx.LinearGeneral)


@functools.cache
def _recording(kind: Any) -> type:
    """Subclass of a Linear layer that keeps its input."""

    def call(self: Any, inputs: Array, *args: Any, **kwargs: Any) -> Any:
        earlier = getattr(self, _COLLECTION, None)
        setattr(self, _COLLECTION, _HeadInput((*(() if earlier is None else _value(earlier)), inputs)))
        return kind.__call__(self, inputs, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})
