"""The main job from images to a report; what `dualxda demo` runs.

`run` chains the stages of `stages.py`, keeps what each computed (`store.py`) and shows it (`content.py`).
"""

from dualxda_jax.pipeline.config import DemoConfig
from dualxda_jax.pipeline.run import run
from dualxda_jax.pipeline.store import Track, Watch

__all__ = ["DemoConfig", "Track", "Watch", "run"]
