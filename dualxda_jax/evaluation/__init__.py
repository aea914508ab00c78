"""Metrics of an attribution: pure functions on arrays, whoever made the scores."""

from dualxda_jax.evaluation.detection import class_detection, subclass_detection
from dualxda_jax.evaluation.faithfulness import Faithfulness, surrogate_faithfulness
from dualxda_jax.evaluation.ranking import MislabelCurve, lds, mislabeling_detection, shortcut_detection

__all__ = [
    "Faithfulness",
    "MislabelCurve",
    "class_detection",
    "lds",
    "mislabeling_detection",
    "shortcut_detection",
    "subclass_detection",
    "surrogate_faithfulness",
]
