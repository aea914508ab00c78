"""The options of a run."""

import dataclasses
import math
from pathlib import Path

from dualxda_jax._check import fail

NETWORKS = ("small-cnn", "resnet-18")


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """All that decides what a run computes.

    Attributes:
        data: folder with a published data set; None takes the embedded sample.
        out: folder of the report; stages are kept in out/stages.
        cost: C of the support vector machine.
        limit: at most that many training and test images, the first ones; None takes all.
        seed: of the network and of the choice of test images.
        network: one of NETWORKS.
        right: test images to explain that the network gets right.
        wrong: test images to explain that the network gets wrong.
        each_way: proponents and opponents shown for a test image, at most.
        evaluated: test images that class detection and surrogate faithfulness are averaged over, at most.
    """

    data: Path | None = None
    out: Path = Path("dualxda-demo")
    cost: float = 1e-3
    limit: int | None = None
    seed: int = 0
    network: str = "small-cnn"
    right: int = 8
    wrong: int = 4
    each_way: int = 3
    evaluated: int = 2000

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cost) and self.cost > 0):
            fail("cost", self.cost, "a positive number")
        if self.limit is not None and self.limit < 1:
            fail("limit", self.limit, "at least 1")
        if not 0 <= self.seed < 2**32:
            fail("seed", self.seed, "in 0..4294967295")
        if self.network not in NETWORKS:
            fail("network", repr(self.network), f"one of {', '.join(NETWORKS)}")
        if self.each_way < 1:
            fail("each_way", self.each_way, "at least 1")
        if self.out.exists() and not self.out.is_dir():
            fail("out", f"the file {self.out}", "a folder")
