"""Relevance propagation for any JAX function: why a training sample matters, pixel by pixel.

`relevance` and `lrp` are the propagation itself; `explain_pair`, `explain_pairs` and `explain_logit` start it from the
scores of DualXDA; `composites` says which rule goes to which layer;
`explain_rules` and `check_conservation` let a model that nobody tested be checked.
"""

from dualxda_jax.xda import composites, rules
from dualxda_jax.xda.composites import Composite
from dualxda_jax.xda.explain import explain_logit, explain_pair, explain_pairs, relevance
from dualxda_jax.xda.graph import NoRuleError
from dualxda_jax.xda.inspection import check_conservation, explain_rules
from dualxda_jax.xda.transform import lrp

__all__ = [
    "Composite",
    "NoRuleError",
    "check_conservation",
    "composites",
    "explain_logit",
    "explain_pair",
    "explain_pairs",
    "explain_rules",
    "lrp",
    "relevance",
    "rules",
]
