"""Whole jobs from images to a report: what the commands of `dualxda` run.

`run` and `evaluate` chain stages (`stages.py`; `cases.py` and `cells.py`), keep what each computed (`store.py`) and
hand it to the report (`content.py`; `results.py`). `fit`, `attribute` and `explain` do one step each on the stages
that `run` keeps (`surrogate.py`, `single.py`); `bench` times the core (`bench.py`).
"""

from dualxda_jax.pipeline.bench import bench
from dualxda_jax.pipeline.config import DemoConfig
from dualxda_jax.pipeline.evaluate import evaluate
from dualxda_jax.pipeline.lineup import EvaluateConfig
from dualxda_jax.pipeline.results import load as load_results
from dualxda_jax.pipeline.run import run
from dualxda_jax.pipeline.single import attribute, explain, fit
from dualxda_jax.pipeline.store import Track, Watch

__all__ = [
    "DemoConfig",
    "EvaluateConfig",
    "Track",
    "Watch",
    "attribute",
    "bench",
    "evaluate",
    "explain",
    "fit",
    "load_results",
    "run",
]
