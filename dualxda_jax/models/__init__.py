"""The paper's networks, adapters from any Flax module to a feature function, and training."""

from dualxda_jax.models import training
from dualxda_jax.models.adapters import from_linen, from_nnx, head_weights
from dualxda_jax.models.folded import faster_apply, small_cnn_logits
from dualxda_jax.models.networks import HEAD, ResNet18, ResNet50, SmallCNN
from dualxda_jax.models.trajectories import Trajectory, trajectory

__all__ = [
    "HEAD", "ResNet18", "ResNet50", "SmallCNN", "Trajectory", "faster_apply", "from_linen", "from_nnx",
    "head_weights", "small_cnn_logits", "training", "trajectory",
]  # fmt: skip
