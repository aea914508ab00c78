"""What the methods on gradients share: which parameters, checkpoints and projection, and the rows that come of it."""

import dataclasses
import numbers
from typing import Any

import jax

from dualxda_jax import _check
from dualxda_jax.baselines import gradients, rows, select
from dualxda_jax.baselines.projections import Projection, check_size, project
from dualxda_jax.baselines.protocol import Context, Loss
from dualxda_jax.types import Array

MEMORY = 1 << 31
"""Bytes of training gradients that are kept by default."""

# Samples whose gradients are taken at once, and the bytes that these may take.
_MOST_SAMPLES = 256
_MOST_BYTES = 1 << 27


@dataclasses.dataclass(frozen=True)
class Config:
    """Static options that the methods on gradients share.

    Attributes:
        params: which parameters take part; see `select.select`.
        projection: random projection of the gradients, or None.
        checkpoints: how many of the context's last checkpoints take part; None for all.
        cosine: gradients are scaled to norm 1; those that are 0 stay 0.
        weighted: the learning rates weight the checkpoints.
        dtype: name of the dtype that gradients are kept in, or None for that of the parameters.
        chunk: samples whose gradients are taken at once, or None for as many as `_MOST_BYTES` hold.
        memory: bytes; the training gradients of a checkpoint are kept if they take no more, else computed anew in
            `scores`.
    """

    params: select.Filter = "all"
    projection: Projection | None = None
    checkpoints: int | None = None
    cosine: bool = False
    weighted: bool = False
    dtype: str | None = None
    chunk: int | None = None
    memory: int = MEMORY

    def __post_init__(self) -> None:
        _check.positive_integer("checkpoints", self.checkpoints, or_none=True)
        _check.positive_integer("chunk", self.chunk, or_none=True)
        if not (isinstance(self.memory, numbers.Real) and self.memory >= 0):
            _check.fail("memory", self.memory, "0 or more bytes")


def projection_of(size: int | None, kind: str) -> Projection | None:
    """A projection of this size and kind; None for no projection."""
    return None if size is None else Projection(size, kind)


def dtype_name(dtype: Any) -> str | None:
    """Name of a floating type; None for that of the parameters."""
    return None if dtype is None else _check.floating_name("dtype", dtype)


def count_checkpoints(asked: int | None, context: Context) -> int:
    """How many checkpoints take part.

    Raises:
        ValueError: the context holds fewer than asked for.
    """
    held = len(context.checkpoints)
    if asked is not None and not 1 <= asked <= held:
        _check.fail("checkpoints", asked, f"at least 1 and at most {held}, the checkpoints of the context")
    return held if asked is None else asked


def take_checkpoint(asked: int | None, context: Context, number: int) -> Any:
    """Parameters of one of the checkpoints that take part."""
    return context.checkpoints[len(context.checkpoints) - count_checkpoints(asked, context) + number]


def gradient_features(
    config: Config, loss: Loss, context: Context, params: Any, key: Array, x: Array, labels: Array
) -> rows.Rows:
    """Rows of gradients of one chunk; one entry [b, P] where they are projected."""
    selection = select.select(params, config.params, head=context.head)
    found = gradients.per_sample(context.logits, loss, selection, params, x, labels, dtype=config.dtype)
    if config.projection is None:
        return found
    check_size(config.projection, parameters(selection, params))
    return {"projected": project(key, config.projection, found)}


def parameters(selection: select.Selection, params: Any) -> int:
    """How many parameters are chosen."""
    return sum(leaf.size for leaf in selection.split(params)[0].values())


def chunk_size(config: Config, loss: Loss, context: Context, params: Any) -> int:
    """Samples whose gradients are taken at once."""
    if config.chunk is not None:
        return config.chunk
    selection = select.select(params, config.params, head=context.head)
    one = jax.eval_shape(
        lambda p, x, y: gradients.per_sample(context.logits, loss, selection, p, x, y),
        params,
        context.inputs[:1],
        context.labels[:1],
    )
    return max(1, min(_MOST_SAMPLES, _MOST_BYTES // max(1, rows.nbytes(one))))
