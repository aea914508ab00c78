"""Static options of the solver, and the warning it gives."""

import dataclasses

from dualxda_jax import _check

METHODS = ("auto", "coordinate", "newton")


class NotConvergedWarning(UserWarning):
    """A solve ended above its tolerance; the solution and its true gap are returned all the same."""


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """Static options of the solver.

    Attributes:
        tolerance: relative duality gap (primal − dual) / max(|primal|, tiny) to reach.
        max_epochs: passes over the features before giving up; looked at between rounds, each of a few passes.
        intercept_scaling: the constant feature b appended to every sample; 0 means none.
        chunk: rows that a pass casts to the working precision at once; bounds the memory beside [n, k].
        penalty: first penalty of the augmented Lagrangian, relative to the cost.
        growth: its growth each time that the anchor moves.
        accuracy: the part of the gap that the inner problem may leave before the anchor moves.
        max_newton: Newton steps of a block, and before an inner problem counts as too hard.
        block: samples that there is room for at least to solve for at once; the others are held fixed meanwhile.
        method: how a block is solved. "coordinate": coordinate ascent with steps on the face, sequential but lean, for
            CPUs; "newton": semismooth Newton on the augmented Lagrangian, a few large products, for accelerators;
            "auto": by the device that the features are on, and "newton" where they are spread over several.
        axis: the mesh axis, or axes, that the rows lie over, for `jit` over a mesh of Auto axes (`jax.set_mesh`), where
            features do not tell how they lie. Without it the compiler may gather them on every device.
        device_bytes: features in host memory (a NumPy array, a memory-mapped file) that are larger than this stay there
            and pass through the device in parts of at most this size. None: half of the device's memory where the
            device tells it, else there is no limit.
    """

    tolerance: float = 1e-4
    max_epochs: int = 2000
    intercept_scaling: float = 0.0
    chunk: int = 1024
    penalty: float = 0.3
    growth: float = 3.0
    accuracy: float = 0.1
    max_newton: int = 50
    block: int = 1024
    method: str = "auto"
    axis: str | tuple[str, ...] | None = None
    device_bytes: int | None = None

    def __post_init__(self) -> None:
        positive = {"tolerance": self.tolerance, "penalty": self.penalty, "accuracy": self.accuracy}
        for name, value in positive.items():
            if not (_check.is_real(value) and value > 0):
                _check.fail(f"config.{name}", repr(value), "positive and finite")
        for name in ("max_epochs", "chunk", "max_newton", "block"):
            _check.positive_integer(f"config.{name}", getattr(self, name))
        _check.positive_integer("config.device_bytes", self.device_bytes, or_none=True)
        axes = (self.axis,) if self.axis is None or isinstance(self.axis, str) else self.axis
        if not isinstance(axes, tuple) or not all(a is None or isinstance(a, str) for a in axes):
            _check.fail("config.axis", repr(self.axis), "the name of a mesh axis, a tuple of names, or None")
        if self.method not in METHODS:
            _check.fail("config.method", repr(self.method), f"one of {', '.join(METHODS)}")
        if not (_check.is_real(self.growth) and self.growth > 1):
            _check.fail("config.growth", repr(self.growth), "finite and above 1")
        if not (_check.is_real(self.intercept_scaling) and self.intercept_scaling >= 0):
            _check.fail("config.intercept_scaling", repr(self.intercept_scaling), "0 or more and finite")


DEFAULT = SolverConfig()
