"""Metrics of an attribution: pure functions on arrays, whoever made the scores; and retraining, which some need."""

from dualxda_jax.evaluation import retrain
from dualxda_jax.evaluation.bootstrap import Interval, bootstrap
from dualxda_jax.evaluation.detection import class_detection, subclass_detection
from dualxda_jax.evaluation.faithfulness import (
    Faithfulness,
    faithfulness_intervals,
    faithfulness_per_query,
    surrogate_faithfulness,
)
from dualxda_jax.evaluation.ranking import (
    MislabelCurve,
    lds,
    mislabeling_detection,
    place_values,
    shortcut_detection,
)
from dualxda_jax.evaluation.relevance import FlippingCurve, mark_relevance_share, pixel_flipping
from dualxda_jax.evaluation.selection import SelectionCurve, coreset_selection, data_pruning

__all__ = [
    "Faithfulness",
    "FlippingCurve",
    "Interval",
    "MislabelCurve",
    "SelectionCurve",
    "bootstrap",
    "class_detection",
    "coreset_selection",
    "data_pruning",
    "faithfulness_intervals",
    "faithfulness_per_query",
    "lds",
    "mark_relevance_share",
    "mislabeling_detection",
    "pixel_flipping",
    "place_values",
    "retrain",
    "shortcut_detection",
    "subclass_detection",
    "surrogate_faithfulness",
]
