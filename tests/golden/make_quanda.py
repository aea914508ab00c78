"""Write what quanda's metrics say of random scores, continuous ones: quanda breaks ties by place.

Run with an environment that has torch, torcheval and quanda 0.5:

    python tests/golden/make_quanda.py

quanda takes the mislabelling curve's area by trapezoids from its first point, and correlates LDS with the margin
z_y − logsumexp(others) of networks trained on subsets, whose logits are handed to it here.
"""

import pathlib

import numpy as np
import torch
from quanda.metrics.downstream_eval import (
    ClassDetectionMetric,
    MislabelingDetectionMetric,
    ShortcutDetectionMetric,
    SubclassDetectionMetric,
)
from quanda.metrics.ground_truth import LinearDatamodelingMetric
from torch import nn

N, Q, K, M = 60, 7, 4, 12


def main():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(Q, N)).astype(np.float32)
    labels, fine = rng.integers(0, K, N), rng.integers(0, 3 * K, N)
    targets, fine_targets = rng.integers(0, K, Q), rng.integers(0, 3 * K, Q)
    labels[:9] = 2
    marked = np.arange(N) < 7
    corrupted = rng.random(N) < 0.3
    own = rng.permutation(N).astype(np.float32)  # quanda adds 1e-4 times the place, which must change no order
    subsets = np.stack([rng.permutation(N) < N // 2 for _ in range(M)])
    logits = rng.normal(size=(M, Q, K)).astype(np.float32)

    x = torch.zeros(N, 1)
    data = [(x[i], int(labels[i])) for i in range(N)]
    model, tensor = nn.Linear(1, K), torch.from_numpy
    found = {}
    for places in (1, 5):
        metric = ClassDetectionMetric(model, data, s=places)
        metric.update(tensor(scores), tensor(targets))
        found[f"class_{places}"] = metric._per_sample_scores()
        metric = SubclassDetectionMetric(model, data, train_subclass_labels=tensor(fine), s=places)
        metric.update(tensor(scores), tensor(fine_targets))
        found[f"subclass_{places}"] = metric._per_sample_scores()
    metric = ShortcutDetectionMetric(
        model, data, shortcut_indices=np.flatnonzero(marked).tolist(), shortcut_cls=2, filter_by_non_shortcut=False,
        filter_by_shortcut_pred=False,
    )  # fmt: skip
    metric.update(tensor(scores))
    found["shortcut"] = metric._per_sample_scores()
    metric = MislabelingDetectionMetric(
        model, data, mislabeling_indices=np.flatnonzero(corrupted).tolist(), precomputed_self_influence=tensor(own)
    )
    values = metric.compute()
    found["mislabel_curve"], found["mislabel_score"] = values["curve"], torch.tensor(values["score"])
    metric = LinearDatamodelingMetric(
        model, data, trainer=None, m=M, subset_ids=[np.flatnonzero(s).tolist() for s in subsets],
        subset_ckpt_filenames=[""] * M,
    )  # fmt: skip
    metric.update(tensor(scores), tensor(targets), torch.zeros(Q, 1), subset_logits=dict(enumerate(tensor(logits))))
    found["lds"] = metric._per_sample_scores()
    np.savez_compressed(
        pathlib.Path(__file__).with_name("quanda.npz"), scores=scores, labels=labels, fine=fine, targets=targets,
        fine_targets=fine_targets, marked=marked, corrupted=corrupted, own=own, subsets=subsets, logits=logits,
        **{f"quanda_{name}": value.numpy() for name, value in found.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
