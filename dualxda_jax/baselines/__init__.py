"""The methods that DualDA is compared with, as pure functions behind one protocol.

    trak = baselines.trak(projection=512)
    fitted = trak.fit(key, baselines.context(logits, params, inputs, labels, num_classes=10))
    scores = trak.scores(fitted, x, targets)  # [q, n], higher: the sample speaks for the target

The methods on gradients and the influence functions multiply gradients in bfloat16 where asked (`dtype=`); all else is
in float32 or float64.
`fit_resumable`, `scores_to` and `top_k` run any of them on many samples; `METHODS` lists them all by name.
"""

from collections.abc import Callable

from dualxda_jax.baselines.control import random
from dualxda_jax.baselines.dualda import dualda
from dualxda_jax.baselines.influence import (
    influence_arnoldi,
    influence_cg,
    influence_ekfac,
    influence_explicit,
    influence_lissa,
)
from dualxda_jax.baselines.on_features import on_features
from dualxda_jax.baselines.products import gradcos, graddot, tracin
from dualxda_jax.baselines.protocol import Context, Method, Stages, context
from dualxda_jax.baselines.representer import NotStationaryWarning, representer
from dualxda_jax.baselines.run import fit_resumable, scores_to, top_k
from dualxda_jax.baselines.similarity import similarity
from dualxda_jax.baselines.trak import trak
from dualxda_jax.baselines.variants import dualda_variant

METHODS: dict[str, Callable[[], Method]] = {
    "dualda": dualda,
    "dualda_variant": dualda_variant,
    "graddot": graddot,
    "gradcos": gradcos,
    "influence_arnoldi": influence_arnoldi,
    "influence_cg": influence_cg,
    "influence_ekfac": influence_ekfac,
    "influence_explicit": influence_explicit,
    "influence_lissa": influence_lissa,
    "random": random,
    "representer": representer,
    "similarity": similarity,
    "tracin": tracin,
    "trak": trak,
}
"""Constructors by name; each can be called without arguments."""

__all__ = [
    "METHODS",
    "Context",
    "Method",
    "NotStationaryWarning",
    "Stages",
    "context",
    "dualda",
    "dualda_variant",
    "fit_resumable",
    "gradcos",
    "graddot",
    "influence_arnoldi",
    "influence_cg",
    "influence_ekfac",
    "influence_explicit",
    "influence_lissa",
    "on_features",
    "random",
    "representer",
    "scores_to",
    "similarity",
    "top_k",
    "tracin",
    "trak",
]
