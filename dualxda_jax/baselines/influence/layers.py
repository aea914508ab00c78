"""Dense and convolution layers of any function (params, x) -> logits, found in its trace; nothing is asked of the
model.

A layer is a kernel among the chosen parameters that meets data in a `dot_general` or a `conv_general_dilated`. Per
sample it computes z_t = Wᵀ a_t at T positions t (1 for a plain dense layer, the output's pixels for a convolution,
whose a_t is the patch under the kernel), so that the gradient of a loss is Σ_t a_t δ_tᵀ with δ_t = ∂loss/∂z_t. A bias
that is added to z is folded in: a_t gets a last coordinate 1, W a last row. A kernel that is used several times in the
same way is one layer with the positions of all uses.

Left out are: scales and shifts of normalisations, embeddings that are looked up, kernels of grouped or depthwise
convolutions, kernels with batch dimensions, kernels that enter scan, while, cond or a function with a custom
derivative, parameters that are also used in another way, and a bias whose kernel is not chosen. `Layers.left_out`
names them with the reason.

The function is traced for one sample and mapped over samples, so that it does not matter where its batch axis is.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax.baselines.influence import products
from dualxda_jax.baselines.influence.products import Atom, Equation, Trace
from dualxda_jax.baselines.rows import wide
from dualxda_jax.baselines.select import Selection
from dualxda_jax.types import Array, Params
from dualxda_jax.xda import _compat

Seeds = Callable[[Array], Array]
"""logits [k] -> [r, k] what is propagated back from the logits of one sample."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A dense or convolution layer.

    Attributes:
        name: path of the kernel in the parameters.
        kernel: number of its leaf among the leaves of the parameters.
        bias: number of the leaf of the bias that is folded in, or None.
        inputs: entries of a_t, the constant one included if there is a bias.
        outputs: entries of z_t.
        index: [inputs without the constant, outputs] place of every entry of W in the flat kernel.
        bias_index: [outputs] place of every entry of W's last row in the flat bias.
    """

    name: str
    kernel: int
    bias: int | None
    inputs: int
    outputs: int
    index: np.ndarray = dataclasses.field(repr=False, compare=False)
    bias_index: np.ndarray | None = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(eq=False, frozen=True)
class Layers:
    """The layers of a function.

    Attributes:
        layers: in the order of the parameters.
        left_out: path of a chosen parameter -> why it is in no layer.
        trace: the function.
        uses: the equations at which each layer's kernel meets data, and which operand the kernel is.
    """

    layers: tuple[Layer, ...]
    left_out: dict[str, str]
    trace: Trace
    uses: tuple[tuple[tuple[Equation, int], ...], ...]


def find(logits: Callable[[Params, Array], Array], params: Params, x: Any, selection: Selection) -> Layers:
    """Find the layers.

    Args:
        logits: (params, x[b, ...]) -> [b, k].
        params: pytree of arrays, or of their shapes.
        x: [...] one input, or its shape.
        selection: which parameters are looked at.

    Returns:
        The layers; that there is none is not an error here.
    """
    traced = products.trace(logits, params, x)
    paths = selection.names
    search = _Search(traced, selection.chosen)
    search.run()
    kernels, left_out = search.sort_out()
    layers, uses = [], []
    for leaf in sorted(kernels):
        first = kernels[leaf][0]
        bias = search.bias_of.get(leaf)
        size = first.index.shape[0] + (bias is not None)
        rows = None if bias is None else search.bias_rows[bias]
        layers.append(Layer(paths[leaf], leaf, bias, size, first.index.shape[1], first.index, rows))
        uses.append(tuple((use.equation, use.side) for use in kernels[leaf]))
    return Layers(tuple(layers), {paths[i]: why for i, why in left_out.items()}, traced, tuple(uses))


@dataclasses.dataclass(eq=False, frozen=True)
class _Use:
    equation: Equation
    side: int
    index: np.ndarray


class _Search:
    """One walk over the trace that notes how every chosen parameter is used."""

    def __init__(self, traced: Trace, chosen: Sequence[bool]) -> None:
        self.trace = traced
        self.chosen = [i for i, wanted in enumerate(chosen) if wanted]
        # Every value that is a parameter in another layout: the leaf, and which of its entries stands where.
        self.leaf = {traced.leaves[i]: i for i in self.chosen}
        self.place = {a: np.arange(a.aval.size, dtype=np.int64).reshape(a.aval.shape) for a in self.leaf}
        self.kernels: dict[int, list[_Use]] = defaultdict(list)
        self.product: dict[Atom, tuple[int, int]] = {}  # output -> leaf of the kernel, number of the use
        self.added: dict[int, list[tuple[int, int]]] = defaultdict(list)  # leaf of a bias -> products it is added to
        self.bias_rows: dict[int, np.ndarray] = {}
        self.bias_of: dict[int, int] = {}
        self.spoilt: dict[int, str] = {}

    def run(self) -> None:
        from_data = {self.trace.data}
        for equation in self.trace.equations:
            if from_data.intersection(equation.inputs):
                from_data.update(equation.outputs)
            for side, atom in enumerate(equation.inputs):
                if atom in self.leaf:
                    self._meet(equation, side, atom, from_data)
        if self.trace.output in self.leaf:
            self.spoilt[self.leaf[self.trace.output]] = "it is an output"

    def _meet(self, equation: Equation, side: int, atom: Atom, from_data: set[Atom]) -> None:
        leaf, place = self.leaf[atom], self.place[atom]
        moved = products.relayout(equation, place)
        if moved is not None:
            self.leaf[equation.outputs[0]], self.place[equation.outputs[0]] = leaf, moved
            return
        partner = equation.inputs[1 - side] if len(equation.inputs) == 2 else None
        whole = place.size == self.trace.leaves[leaf].aval.size
        if partner in from_data and whole and products.is_product(equation, side):
            self.product[equation.outputs[0]] = (leaf, len(self.kernels[leaf]))
            self.kernels[leaf].append(_Use(equation, side, products.kernel_matrix(place, equation, side)))
        elif partner in self.product and equation.name in ("add", "add_any"):
            self._add(leaf, np.broadcast_to(place, equation.outputs[0].aval.shape), *self.product[partner])
        else:
            grouped = partner in from_data and equation.name in ("dot_general", "conv_general_dilated")
            self.spoilt[leaf] = f"used by `{equation.name}`" + (" with groups or batch dimensions" if grouped else "")

    def _add(self, leaf: int, place: np.ndarray, owner: int, number: int) -> None:
        """Note a bias: one vector for all positions, each of its entries at one output."""
        use = self.kernels[owner][number]
        rows = products.output_rows(place, use.equation, use.side)
        known = self.bias_rows.setdefault(leaf, rows[0])
        if (rows == known).all() and np.array_equal(np.sort(rows[0]), np.arange(self.trace.leaves[leaf].aval.size)):
            self.added[leaf].append((owner, number))
        else:
            self.spoilt[leaf] = "added in another way than a bias"

    def sort_out(self) -> tuple[dict[int, list[_Use]], dict[int, str]]:
        """Kernels with their uses, and why other chosen leaves are in no layer."""
        for leaf, uses in self.kernels.items():
            if any(not np.array_equal(use.index, uses[0].index) for use in uses):
                self.spoilt[leaf] = "used in several layouts"
            if leaf in self.added:
                self.spoilt[leaf] = "both a kernel and a bias"
        kernels = {leaf: uses for leaf, uses in self.kernels.items() if leaf not in self.spoilt}
        for leaf, added in self.added.items():
            owner = added[0][0]
            every = [(owner, number) for number in range(len(kernels.get(owner, ())))]
            if leaf in self.spoilt or sorted(added) != every or owner in self.bias_of:
                self.spoilt.setdefault(leaf, "its kernel is in no layer, or has uses without it, or another bias")
            else:
                self.bias_of[owner] = leaf
        used = set(kernels) | set(self.bias_of.values())
        unused = "not used with data" + ", as a kernel or the bias of a chosen kernel"
        return kernels, {i: self.spoilt.get(i, unused) for i in self.chosen if i not in used}


def factors(found: Layers, params: Params, x: Array, seeds: Seeds) -> list[tuple[Array, Array]]:
    """The two factors of one sample's gradients in every layer.

    Args:
        found: from `find`.
        params: the parameters.
        x: [...] one input.
        seeds: what to propagate back from the logits, r vectors.

    Returns:
        For each layer a [t, inputs] and δ [r, t, outputs]; gradient number r is aᵀ δ[r].
    """
    leaves = jax.tree.leaves(params)
    outputs = [[equation.outputs[0].aval for equation, _ in uses] for uses in found.uses]
    taps = [[jnp.zeros(a.shape, a.dtype) for a in avals] for avals in outputs]
    logits, back, inputs = jax.vjp(lambda taps: _run(found, leaves, x, taps), taps, has_aux=True)
    (cotangents,) = jax.vmap(back)(seeds(logits))
    result = []
    for layer, uses, data, cotangent in zip(found.layers, found.uses, inputs, cotangents, strict=True):
        a = [products.input_rows(v, *use) for v, use in zip(data, uses, strict=True)]
        delta = [products.output_rows(v, *use) for v, use in zip(cotangent, uses, strict=True)]
        if layer.bias is not None:
            a = [jnp.concatenate([v, jnp.ones((v.shape[0], 1), v.dtype)], axis=1) for v in a]
        dtype = wide(a[0].dtype)
        result.append((jnp.concatenate(a, axis=0).astype(dtype), jnp.concatenate(delta, axis=1).astype(dtype)))
    return result


def _run(found: Layers, leaves: Sequence[Array], x: Array, taps: list[list[Array]]) -> tuple[Array, Any]:
    """The function with `taps` added to the products; gives the logits and the data that the kernels meet."""
    traced = found.trace
    place = {use: (i, j) for i, uses in enumerate(found.uses) for j, use in enumerate(uses)}
    env: dict[Atom, Any] = {**traced.constants, **dict(zip(traced.leaves, leaves, strict=True)), traced.data: x}
    seen: list[list[Any]] = [[None] * len(uses) for uses in found.uses]

    def read(atom: Atom) -> Any:
        return env[atom] if atom.literal is None else atom.literal

    sides = {equation: side for uses in found.uses for equation, side in uses}
    for equation in traced.equations:
        values = [read(a) for a in equation.inputs]
        computed = _compat.bind(equation.source, values)
        if equation in sides:
            i, j = place[equation, sides[equation]]
            seen[i][j] = values[1 - sides[equation]]
            computed = (computed[0] + taps[i][j],)
        env.update(zip(equation.outputs, computed, strict=True))
    return read(traced.output), seen
