"""Influence functions: how the loss at a query would change, to first order, were a training sample left out.

All give gᵀ (H + λ)⁻¹ g_i and differ in how they come by the inverse: `influence_explicit` writes the Hessian out,
`influence_cg` solves a linear system for every query, `influence_lissa` sums a stochastic series, `influence_arnoldi`
keeps the dominant eigenvectors, `influence_ekfac` factors the Gauss-Newton matrix layer by layer.

`dtype="bfloat16"` rounds what `scores` multiplies, (H + λ)⁻¹ g and g_i, and nothing before the inverse: rounding g, or
the curvature, would be magnified by up to the Hessian's largest eigenvalue over λ.
"""

from dualxda_jax.baselines.influence.arnoldi import influence_arnoldi
from dualxda_jax.baselines.influence.cg import NotConvergedWarning, influence_cg
from dualxda_jax.baselines.influence.ekfac import influence_ekfac, left_out
from dualxda_jax.baselines.influence.explicit import influence_explicit
from dualxda_jax.baselines.influence.lissa import influence_lissa

__all__ = [
    "NotConvergedWarning",
    "influence_arnoldi",
    "influence_cg",
    "influence_ekfac",
    "influence_explicit",
    "influence_lissa",
    "left_out",
]
