"""DualXDA for JAX: which training samples made a prediction so, and through which features.

The rooms, each a namespace that is loaded when it is first used:

- `svm`: the multi-class SVM whose dual variables are the attribution (`solve`, `objectives`).
- `attribution`: scores, top-k, self-influence from a solution.
- `xda`: relevance propagation of a pair's score to both inputs.
- `features`, `models`, `data`: from a network and images to features.
- `baselines`: the methods that DualDA is compared with, behind one protocol.
- `evaluation`, `report`, `checkpoint`: metrics, pictures, files.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dualxda_jax._version import __version__

if TYPE_CHECKING:
    from dualxda_jax import (
        attribution,
        baselines,
        checkpoint,
        data,
        evaluation,
        features,
        models,
        report,
        svm,
        types,
        xda,
    )

_ROOMS = frozenset(
    [
        "attribution", "baselines", "checkpoint", "data", "evaluation", "features", "models", "report", "svm", "types",
        "xda",
    ]
)  # fmt: skip

__all__ = [
    "__version__", "attribution", "baselines", "checkpoint", "data", "evaluation", "features", "models", "report",
    "svm", "types", "xda",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"dualxda_jax.{name}")
    raise AttributeError(f"module 'dualxda_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
