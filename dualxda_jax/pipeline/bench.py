"""How fast the core is on this machine: solve, attribute, explain; what `dualxda bench` prints."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import attribution, models, svm, xda
from dualxda_jax._check import fail
from dualxda_jax.pipeline import content, stages, store


def bench(
    *, samples: int = 60_000, dim: int = 100, classes: int = 10, cost: float = 1e-3, queries: int = 1000,
    repeats: int = 3, seed: int = 0, track: store.Track | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Time the core on synthetic features, warm.

    Features are ReLUs of noisy class prototypes, as deep features look. Relevance is that of the small CNN on random
    images: its time does not depend on their values.

    Args:
        samples: n.
        dim: d.
        classes: k.
        cost: C.
        queries: q.
        repeats: of each timing; the median counts, the first call (with compilation) stands beside it.
        seed: of the features.
        track: shows the progress of a stage; None shows nothing.

    Returns:
        "rows": [name, first seconds, median seconds, what of], "support_vectors", "gap", "converged", "environment".

    Raises:
        ValueError: a size below 1 (classes: 2), a seed outside 0..2³² - 1, or a cost that `svm.solve` refuses.
    """
    sizes = {"samples": samples, "dim": dim, "classes": classes - 1, "queries": queries, "repeats": repeats}
    for name, value in sizes.items():
        if value < 1:
            fail(name, value + (name == "classes"), "2 or more" if name == "classes" else "1 or more")
    if not 0 <= seed < 2**32:
        fail("seed", seed, "in 0..4294967295")
    track = track or store.silent
    values, labels, asked, targets = synthetic(samples, dim, classes, queries, seed)
    rows: list[list[Any]] = []

    def row(name: str, run: Callable[[], Any], of: str) -> Any:
        with track(name):
            found, first = _timed(run)
            rows.append([name, first, statistics.median(_timed(run)[1] for _ in range(repeats)), of])
        return found

    solve = lambda: svm.solve(values, labels, num_classes=classes, cost=cost)  # noqa: E731
    solution = row("fit dual SVM", solve, f"{samples:,} × {dim:,} × {classes:,}, C = {cost:g}")
    support = attribution.compress(values, labels, solution)
    s = len(support.index)
    row("scores", lambda: attribution.scores(support, asked, targets), f"{queries:,} queries × {s:,} support vectors")
    places = min(5, s)
    row(
        "top samples",
        lambda: attribution.top_k(support, asked, targets, k=places),
        f"{queries:,} queries, {places} each",
    )
    model = models.from_linen(module := models.SmallCNN(num_classes=10), head=models.HEAD)
    images = jax.random.uniform(jax.random.key(seed), (stages.PAIRS_AT_ONCE, 28, 28, 1))
    params = module.init(jax.random.key(seed), images)
    row(
        "relevance of pairs",
        lambda: xda.explain_pairs(
            model.features, params, images, images[::-1], jnp.ones(len(images)), composite=stages.COMPOSITE
        ),
        f"{len(images)} pairs of 28 × 28 images, small CNN, both maps",
    )  # fmt: skip
    info = solution.info
    return {
        "rows": rows,
        "support_vectors": s,
        "gap": float(info.gap),
        "converged": bool(info.converged),
        "environment": list(content.machine()),
    }


def synthetic(samples: int, dim: int, classes: int, queries: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """Features [n, d], labels [n], queries [q, d], targets [q]: ReLUs of noisy prototypes, 1% of the labels random."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim))
    labels = rng.integers(0, classes, samples + queries)
    values = np.maximum(centres[labels] + rng.normal(size=(samples + queries, dim)), 0).astype(np.float32)
    flip = rng.random(samples + queries) < 0.01
    labels[flip] = rng.integers(0, classes, flip.sum())
    x, y = jnp.asarray(values), jnp.asarray(labels.astype(np.int32))
    return x[:samples], y[:samples], x[samples:], y[samples:]


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = jax.block_until_ready(run())
    return found, time.perf_counter() - start
