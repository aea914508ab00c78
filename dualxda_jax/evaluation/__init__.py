"""Metrics of an attribution: pure functions on arrays, whoever made the scores."""

from dualxda_jax.evaluation.detection import class_detection, subclass_detection
from dualxda_jax.evaluation.faithfulness import Faithfulness, surrogate_faithfulness

__all__ = ["Faithfulness", "class_detection", "subclass_detection", "surrogate_faithfulness"]
