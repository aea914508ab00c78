"""Static options of the solver, and the warning it gives."""

import dataclasses

from dualxda_jax import _check

METHODS = ("auto", "coordinate", "newton")


class NotConvergedWarning(UserWarning):
    """A solve ended above its tolerance; the solution and its true gap are returned all the same."""


@dataclasses.dataclass(frozen=True)
class Heuristics:
    """What decides how fast block coordinate ascent goes, never what it converges to.

    On MNIST features `group`, `room`, `passes`, `reduction`, `max_cycles`, `violators_times` and `least_rows` were
    varied; the others are those of a prototype or of the solver before.

    Attributes:
        group: samples of a Gram group. A visit costs more in a larger one, a matrix product less.
        part: free samples that a subspace step reads at once.
        room: the working set holds this part of all samples at most, but never less than `SolverConfig.block`.
        buckets: sizes n between two powers of two that have programs of their own; others are filled up to the next.
        fill_bytes: features of more bytes are not copied for that: each n of theirs has programs of its own.
        few_classes: up to so many classes a projection tries all candidate sets, and a step corrects all scores of its
            group: k² and k numbers a step, cheaper than iterating where k is small.
        projection_steps: Newton steps on the threshold of a projection with more classes. With 300 classes, 6 took six
            times the epochs of 12, or did not converge; 20 changed nothing.
        least_curvature: C ‖φ‖² + γ counts as this at least; steps beyond its inverse all end at the leading classes.
        passes: sweeps over all samples before margins are first recomputed; more of them are wasted.
        passes_from: a warm start with more than this share of violators is given up for zero.
        reduction: share of the gap that a working set leaves; a tenth balances sweeps against recomputed margins.
        aim: share of the target that ends the work on a working set.
        first_target: share of the tolerance that rounds aim at, so that rounding finds some room left.
        max_cycles: sweeps over a working set at most.
        settled: a subspace step is due once fewer than this share of the free samples change classes in a sweep.
        free_room: the subspace step has room for this share of the working set, and takes the first of what is free,
        least_free: but for so many samples at least.
        skip_share: a sweep passes over violations below this share of the mean that the goal allows.
        skip_margin: and never over larger ones than this, in units of the margin.
        cg_least: conjugate gradient iterations of the first subspace step.
        cg_most: at most; the number doubles after each step that could be taken whole.
        cg_forcing: share of the residual that is left.
        flat: curvature per squared length that counts as none in float32.
        promise: share of the promised gain below which a smaller share of the step is tried.
        share_fall: by how much the share falls then.
        least_share: and down to where.
        precise_gap: relative gap below which scores are float64 products; above, float32 tells enough.
        violators_times: the working set holds so many times the samples that violate their margin or are free,
        least_rows: and so many more; those come next in KKT slack, and are likely to violate their margin soon.
        levels: binary logarithms between which the level of slack that this takes is sought, by bisection,
        level_steps: in so many steps.
        join_rounding: samples with a KKT slack below this, in units of the margin, join the rounding sweep
            and absorb the others' rounding error.
        poor_rise: a round stagnates where the dual rises by less than this part of itself and of the gap,
        poor_gap: and more than this part of the gap is left.
        poor_rounds: stagnating rounds before another method takes over.
        long_epochs: passes after which a gap above `far` counts as stagnation, too.
        far: relative gap.
        max_roundings: rounding sweeps whose certificate may fall short.
        kept: relative rounding of norms and slacks kept in float32.
        units: rounding of a float32 score in units in the last place of ‖w‖‖φ‖,
        units_a_feature: and so many more for each feature that it sums over.
    """

    group: int = 64
    part: int = 256
    room: float = 0.125
    buckets: int = 8
    fill_bytes: int = 1 << 25
    few_classes: int = 16
    projection_steps: int = 12
    least_curvature: float = 1e-30
    passes: int = 1
    passes_from: float = 0.17
    reduction: float = 0.1
    aim: float = 0.4
    first_target: float = 0.9
    max_cycles: int = 60
    settled: float = 0.25
    free_room: float = 0.25
    least_free: int = 1024
    skip_share: float = 0.02
    skip_margin: float = 1e-3
    cg_least: int = 16
    cg_most: int = 200
    cg_forcing: float = 0.1
    flat: float = 1e-7
    promise: float = 0.5
    share_fall: float = 0.3
    least_share: float = 0.02
    precise_gap: float = 1e-2
    violators_times: float = 1.5
    least_rows: float = 128.0
    levels: tuple[int, int] = (-40, 10)
    level_steps: int = 14
    join_rounding: float = 0.1
    poor_rise: float = 0.02
    poor_gap: float = 0.5
    poor_rounds: int = 4
    long_epochs: float = 300.0
    far: float = 1e-2
    max_roundings: int = 6
    kept: float = 1e-5
    units: float = 16.0
    units_a_feature: float = 0.125


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
        heuristics: the constants of block coordinate ascent.
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
    heuristics: Heuristics = Heuristics()

    def __post_init__(self) -> None:
        positive = {"tolerance": self.tolerance, "penalty": self.penalty, "accuracy": self.accuracy}
        for name, value in positive.items():
            if not (_check.is_real(value) and value > 0):
                _check.fail(f"config.{name}", repr(value), "positive and finite")
        for name in ("max_epochs", "chunk", "max_newton", "block"):
            _check.positive_integer(f"config.{name}", getattr(self, name))
        _check.positive_integer("config.device_bytes", self.device_bytes, or_none=True)
        if not isinstance(self.heuristics, Heuristics):
            _check.fail("config.heuristics", type(self.heuristics).__name__, "a svm.Heuristics")
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
