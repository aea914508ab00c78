"""Write influence scores of dattri and kronfluence (torch) on one small CNN.

Run with an environment that has torch, dattri 0.3.0 and kronfluence 1.0.1:

    python tests/golden/make_influence.py

Weights and images are float32 values, everything is computed in float64. Images are channels first, as torch has them.
Scores are [q, n]; the query's loss is taken at its target, the training losses at their labels, and the Hessian is that
of the mean loss. EK-FAC and K-FAC use the empirical Fisher, which needs no random numbers; K-FAC is taken on the two
dense layers alone, since kronfluence scales it by another power of the number of positions in a convolution.
"""

import functools
import pathlib
import tempfile

import numpy as np
import torch
from dattri.algorithm.influence_function import IFAttributorArnoldi, IFAttributorCG, IFAttributorExplicit
from dattri.task import AttributionTask
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.utils.data import DataLoader, TensorDataset

HERE = pathlib.Path(__file__).parent
DAMPING, HEAD_DAMPING, RANK = 0.05, 0.01, 8


class CNN(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_0 = torch.nn.Conv2d(1, 3, 3)
        self.conv_1 = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.dense_0 = torch.nn.Linear(36, 8)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.conv_1(torch.tanh(self.conv_0(x)))).flatten(1)
        return self.head(torch.relu(self.dense_0(x)))


def data():
    """Images of four noisy patterns, a tenth of the labels wrong."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 1, 8, 8, generator=generator)
    labels = torch.arange(48) % 4
    images = 0.5 * patterns[labels] + torch.randn(48, 1, 8, 8, generator=generator)
    labels[::10] = (labels[::10] + 1) % 4
    images = images.float().double()
    return (images[:42], labels[:42]), (images[42:], labels[42:])


def train(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.float().double())


def dattri(model, training, queries):
    def loss(params, data):
        x, y = data
        x, y = (x, y) if x.ndim == 4 else (x[None], y[None])
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, params, x), y)

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    head = ["head.weight", "head.bias"]
    full, some = DataLoader(TensorDataset(*training), 64), DataLoader(TensorDataset(*queries), 64)
    torch.set_default_dtype(torch.float64)
    methods = {
        "explicit": IFAttributorExplicit(task, regularization=DAMPING),
        "cg": IFAttributorCG(task, regularization=DAMPING, max_iter=60),
        "arnoldi": IFAttributorArnoldi(task, head, proj_dim=RANK, max_iter=37, regularization=HEAD_DAMPING),
    }
    scores = {}
    for name, method in methods.items():
        method.cache(full)
        scores[name] = method.attribute(full, some).T.detach().numpy()
    return scores


class Classification(Task):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def compute_train_loss(self, batch, model, sample=False):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self.layers


def kronfluence(model, training, queries, strategy, layers):
    task = Classification(layers)
    model = prepare_model(model, task)
    kinds = ["activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda"]
    factors = FactorArguments(
        strategy=strategy, use_empirical_fisher=True, **{f"{kind}_dtype": torch.float64 for kind in kinds}
    )
    kinds = ["score", "per_sample_gradient", "precondition"]
    scoring = ScoreArguments(damping_factor=1e-3, **{f"{kind}_dtype": torch.float64 for kind in kinds})
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("golden", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        training, queries = TensorDataset(*training), TensorDataset(*queries)
        analyzer.fit_all_factors("factors", training, per_device_batch_size=64, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "pairs", "factors", queries, training, per_device_query_batch_size=6, score_args=scoring
        )
        analyzer.compute_self_scores("self", "factors", training, per_device_train_batch_size=64, score_args=scoring)
        pairs, own = analyzer.load_pairwise_scores("pairs"), analyzer.load_self_scores("self")
    return pairs["all_modules"].numpy(), own["all_modules"].numpy()


def main():
    torch.manual_seed(0)
    model = CNN().double()
    training, queries = data()
    train(model, *training)
    model.eval()
    arrays = {f"weights/{k}": v.detach().numpy().astype(np.float32) for k, v in model.state_dict().items()}
    for name, (x, y) in {"train": training, "query": queries}.items():
        arrays |= {f"{name}/x": x.numpy().astype(np.float32), f"{name}/y": y.numpy().astype(np.int32)}
    arrays |= {f"scores/{name}": scores for name, scores in dattri(model, training, queries).items()}
    pairs = functools.partial(kronfluence, training=training, queries=queries)
    for strategy, layers in (("kfac", ["dense_0", "head"]), ("ekfac", None)):
        twin = CNN().double()
        twin.load_state_dict(model.state_dict())
        arrays[f"scores/{strategy}"], arrays[f"self/{strategy}"] = pairs(twin, strategy=strategy, layers=layers)
    assert all(np.isfinite(a).all() for a in arrays.values())
    np.savez_compressed(HERE / "influence_cnn.npz", **arrays)


if __name__ == "__main__":
    main()
