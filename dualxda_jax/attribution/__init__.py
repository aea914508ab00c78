"""Attribution of a query to the training samples through the dual variables of the surrogate (DualDA).

A solution is first reduced to its support vectors (`compress`, on the host, because their number depends on values).
Everything after that is a pure function of a `SupportModel` and works under `jit`, `vmap`, `grad` and on a mesh.
The score of training sample i for class c at a query with features φ is α_ic (⟨φ_i, φ⟩ + b²); scores of all samples
sum to the surrogate's logit of c. Positive: i speaks for c (proponent); negative: against it (opponent).

Products are taken at the highest precision and accumulated in float32 or wider, whatever the inputs' dtypes.

Source: "Sparse, Efficient and Explainable Data Attribution with DualXDA", arXiv 2402.12118.
"""

from dualxda_jax.attribution.ranking import top_k
from dualxda_jax.attribution.scoring import logits, scores, self_influence
from dualxda_jax.attribution.support import compress, dense

__all__ = ["compress", "dense", "logits", "scores", "self_influence", "top_k"]
