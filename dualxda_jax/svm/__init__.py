"""The multi-class SVM whose dual variables are the attribution.

- `solve`: fit, certified by the duality gap. `solve_path`: many costs.
- `init`, `step`, `finish`: the same algorithm for loops of one's own.
- `objectives`: primal and dual objective of any dual variables.
"""

from dualxda_jax.svm.config import NotConvergedWarning, SolverConfig
from dualxda_jax.svm.objectives import objectives
from dualxda_jax.svm.path import solve_path
from dualxda_jax.svm.solver import finish, init, solve, step
from dualxda_jax.svm.working_set import SolverState

__all__ = [
    "NotConvergedWarning",
    "SolverConfig",
    "SolverState",
    "finish",
    "init",
    "objectives",
    "solve",
    "solve_path",
    "step",
]
