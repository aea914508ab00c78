"""Make liblinear_*.npz: small Crammer-Singer problems as LIBLINEAR solves them.

Needs a Python with numpy, scipy, joblib, threadpoolctl and `pip install --no-deps dualxda_skl` (module `sklearn_dual`:
scikit-learn's LinearSVC with the dual variables kept). Run it anywhere; the files land beside it.

LIBLINEAR leaves the dual variables of zero rows at zero, where the dual objective wants them at the bound (W does not
depend on them), and knows nothing of classes without samples: such files have large gaps.

Each file holds features [n, d], labels [n], num_classes, cost, intercept_scaling (b; LIBLINEAR appends the constant
feature b), alpha [n, k], coef [k, d], intercept [k] and gap: the relative duality gap that LIBLINEAR really reached.
"""

import pathlib

import numpy as np
from sklearn_dual.svm import LinearSVC

HERE = pathlib.Path(__file__).parent


def clusters(rng, n, d, k, noise=0.7, weights=None):
    """Rectified Gaussian clusters: like the features of a network, of a large common mean."""
    labels = rng.choice(k, size=n, p=weights)
    centres = rng.normal(size=(k, d))
    return np.maximum(centres[labels] + noise * rng.normal(size=(n, d)), 0.0), labels


def problems():
    """(name, features, labels, k, cost, b)."""
    rng = np.random.default_rng(7)
    x, y = clusters(rng, 60, 8, 4)
    yield "plain", x, y, 4, 1e-2, 0.0
    yield "tiny_cost", x, y, 4, 1e-6, 0.0
    yield "large_cost", x, y, 4, 1e1, 0.0
    yield "intercept", x, y, 4, 1e-1, 1.0
    yield "scaled_up", x * 1e3, y, 4, 1e-8, 0.0
    yield "scaled_down", x * 1e-3, y, 4, 1e4, 0.0
    x, y = clusters(rng, 60, 8, 4, weights=[0.85, 0.07, 0.05, 0.03])
    yield "unbalanced", x, y, 4, 1e-1, 0.0
    x, y = clusters(rng, 40, 8, 4)
    x = np.concatenate([x, x[:20]])
    y = np.concatenate([y, np.where(np.arange(20) < 5, (y[:20] + 1) % 4, y[:20])])
    yield "duplicates", x, y, 4, 1e-2, 0.0
    x, y = clusters(rng, 60, 8, 4)
    x[::7] = 0.0
    yield "zero_rows", x, y, 4, 1e-1, 0.0
    x, y = clusters(rng, 60, 8, 4)
    yield "absent_class", x, np.where(y == 1, 2, y), 4, 1e-1, 0.0
    x, y = clusters(rng, 60, 5, 2, noise=1.2)
    yield "two_classes", x, y, 2, 1e-1, 0.0
    x, y = clusters(rng, 25, 60, 3)
    yield "wide", x, y, 3, 1e-2, 0.0
    yield "three_samples", x[:3], np.array([0, 1, 2]), 3, 1.0, 0.0


def fit(x, y, k, cost, b, tolerance):
    """LIBLINEAR's alpha [n, k]."""
    present = np.unique(y)
    extra = {"fit_intercept": True, "intercept_scaling": b} if b else {"fit_intercept": False}
    model = LinearSVC(multi_class="crammer_singer", C=cost, tol=tolerance, max_iter=100_000, random_state=0, **extra)
    model.fit(x, y)
    alpha = np.zeros((len(y), k))
    alpha[:, present] = model.alpha_.T
    return alpha


def gap(x, y, k, cost, b, alpha):
    """The relative duality gap of alpha, and its weights."""
    full = np.concatenate([x, np.full((len(x), 1), b)], axis=1)
    weights = alpha.T @ full
    rows = np.arange(len(y))
    z = full @ weights.T
    true = z[rows, y]
    z = z + 1.0
    z[rows, y] -= 1.0
    primal = 0.5 * np.sum(weights**2) + cost * np.sum(z.max(axis=1) - true)
    dual = -0.5 * np.sum(weights**2) - (alpha.sum() - alpha[rows, y].sum())
    return (primal - dual) / primal, weights


def main():
    """Write every file."""
    for name, x, y, k, cost, b in problems():
        x = x.astype(np.float32).astype(np.float64)
        # A tighter tolerance does not always end closer: its shrinking gives up at times. Keep its best.
        tried = [fit(x, y, k, cost, b, tolerance) for tolerance in (1e-3, 1e-4, 1e-6, 1e-9)]
        alpha = min(tried, key=lambda a: gap(x, y, k, cost, b, a)[0])
        reached, weights = gap(x, y, k, cost, b, alpha)
        np.savez_compressed(
            HERE / f"liblinear_{name}.npz",
            features=x.astype(np.float32),
            labels=y.astype(np.int32),
            num_classes=k,
            cost=cost,
            intercept_scaling=b,
            alpha=alpha,
            coef=weights[:, :-1],
            intercept=b * weights[:, -1],
            gap=reached,
        )
        print(f"{name:18s} n {len(y):3d} k {k} C {cost:g} b {b:g} gap {reached:.1e}")


if __name__ == "__main__":
    main()
