"""Metrics of an attribution: pure functions on arrays, whoever made the scores."""

from dualxda_jax.evaluation.detection import class_detection, subclass_detection
from dualxda_jax.evaluation.faithfulness import Faithfulness, surrogate_faithfulness
from dualxda_jax.evaluation.ranking import MislabelCurve, lds, mislabeling_detection, shortcut_detection
from dualxda_jax.evaluation.relevance import FlippingCurve, mark_relevance_share, pixel_flipping

__all__ = [
    "Faithfulness",
    "FlippingCurve",
    "MislabelCurve",
    "class_detection",
    "lds",
    "mark_relevance_share",
    "mislabeling_detection",
    "pixel_flipping",
    "shortcut_detection",
    "subclass_detection",
    "surrogate_faithfulness",
]
