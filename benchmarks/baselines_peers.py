"""The torch side of `baselines.py`: runs in a Python with torch, captum, dattri, kronfluence and traker.

    python benchmarks/baselines_peers.py GIVEN.npz NAME OUT.npz float32|float64

GIVEN is what `baselines.py` exports. For each line "N" on standard input the job is run on the first N training samples
and its seconds are printed; scores [q, n] of the last one go to OUT. The start of the interpreter, imports of torch and
the construction of the network are not timed. Training samples go in as few batches as memory holds, because the
packages redo per batch what does not depend on it (gradients of the queries, random matrices).
"""

import importlib
import json
import sys
import tempfile
import time
import warnings

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
DAMPING, DEPTH = 1e-2, 100


class CNN(nn.Module):
    """The paper's small CNN, with its penultimate features as a module of their own."""

    def __init__(self):
        super().__init__()
        sizes = [1, 5, 10, 5]
        for i in range(3):
            setattr(self, f"conv_{i}", nn.Conv2d(sizes[i], sizes[i + 1], 3))
        self.dense_0, self.dense_1, self.head = nn.Linear(2420, 500), nn.Linear(500, 100), nn.Linear(100, 10)
        self.features = nn.ReLU()

    def forward(self, x):
        for i in range(3):
            x = torch.relu(getattr(self, f"conv_{i}")(x))
        return self.head(self.features(self.dense_1(torch.relu(self.dense_0(x.flatten(1))))))


class Job:
    """The network, the first n training samples and the queries."""

    def __init__(self, given, n, dtype):
        floats = lambda a: torch.tensor(a, dtype=dtype)  # noqa: E731
        self.n, self.net = n, CNN().to(dtype).eval()
        self.net.load_state_dict({k[2:]: floats(given[k]) for k in given.files if k.startswith("w/")})
        self.state = {k: v.clone() for k, v in self.net.state_dict().items()}
        self.train = TensorDataset(floats(given["x"][:n]), torch.tensor(given["y"][:n]).long())
        self.query = TensorDataset(floats(given["xq"]), torch.tensor(given["yq"]).long())

    def loaders(self, batch):
        return DataLoader(self.train, min(batch, self.n)), DataLoader(self.query, len(self.query))

    def call(self, params, x):
        return torch.func.functional_call(self.net, params, x)

    def loss(self, params, pair):
        """Of one sample, or the mean of several, as dattri wants both."""
        x, y = pair if pair[1].ndim else (pair[0][None], pair[1][None])
        return nn.functional.cross_entropy(self.call(params, x), y.long())

    def on_features(self):
        """The same with the final layer as the network, on features that are extracted here, within what is timed."""
        with torch.no_grad():
            body = nn.Sequential(self.net.conv_0, nn.ReLU(), self.net.conv_1, nn.ReLU(), self.net.conv_2, nn.ReLU())
            tail = nn.Sequential(nn.Flatten(), self.net.dense_0, nn.ReLU(), self.net.dense_1, nn.ReLU())
            train, query = (
                TensorDataset(torch.cat([tail(body(x)) for x in data.tensors[0].split(250)]), data.tensors[1])
                for data in (self.train, self.query)
            )
        self.train, self.query = train, query
        self.net = nn.Sequential(self.net.head)
        self.state = {f"0.{k}": self.state[f"head.{k}"] for k in ("weight", "bias")}
        return self

    def task(self, loss=None):
        from dattri.task import AttributionTask

        return AttributionTask(model=self.net, loss_func=loss or self.loss, checkpoints=[self.state])


def similarity_captum(job):
    from captum.influence import SimilarityInfluence

    with tempfile.TemporaryDirectory() as folder:
        # captum 0.9 hands a list of one layer's activations over.
        images, dot = job.train.tensors[0], lambda a, b: (a[0] if isinstance(a, list) else a) @ b.T
        method = SimilarityInfluence(
            job.net, "features", images, folder, similarity_metric=dot, batch_size=min(2500, job.n)
        )
        places, values = method.influence(job.query.tensors[0], top_k=job.n)["features"]
    # The same sign as ours, which the package leaves to its user.
    scores = torch.zeros_like(values).scatter(1, places, values)
    return torch.where(job.query.tensors[1][:, None] == job.train.tensors[1][None], scores, -scores)


def dattri_tracin(job, cosine=False, size=None, layers=None, batch=500):
    from dattri.algorithm.tracin import TracInAttributor

    projector = {"proj_dim": size, "proj_max_batch_size": 32, "device": "cpu"}
    method = TracInAttributor(
        task=job.task(),
        weight_list=torch.ones(1),
        normalized_grad=cosine,
        projector_kwargs=projector,
        layer_name=layers,
    )
    if size is None:
        method.projector_kwargs = None
    with torch.no_grad():
        return method.attribute(*job.loaders(batch)).T


def captum_tracin(job, batch=50):
    from captum.influence import TracInCP

    method = TracInCP(
        job.net,
        job.train,
        ["0"],
        lambda m, c: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=batch,
        sample_wise_grads_per_batch=True,
    )
    return method.influence(job.query.tensors)


def captum_tracin_head(job):
    from captum.influence import TracInCPFast

    loss = nn.CrossEntropyLoss(reduction="sum")
    method = TracInCPFast(job.net, job.net.head, job.train, ["0"], lambda m, c: 1.0, loss_fn=loss, batch_size=2500)
    return method.influence(job.query.tensors)


def traker(job, batch=500, block=128):
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    count = sum(a.numel() for a in job.net.parameters())
    with tempfile.TemporaryDirectory() as folder:
        projector = BasicProjector(count, 2048, 0, ProjectionType.rademacher, "cpu", block_size=block)
        method = TRAKer(
            job.net,
            "image_classification",
            job.n,
            folder,
            device="cpu",
            projector=projector,
            proj_dim=2048,
            use_half_precision=False,
            lambda_reg=1.0 if job.n < 4096 else 0.0,
        )
        method.load_checkpoint(job.state, model_id=0)
        for x, y in job.loaders(batch)[0]:
            method.featurize(batch=[x, y], num_samples=len(x))
        method.finalize_features()
        method.start_scoring_checkpoint("q", job.state, 0, num_targets=len(job.query))
        method.score(batch=list(job.query.tensors), num_samples=len(job.query))
        return torch.tensor(np.array(method.finalize_scores("q")).T)


def dattri_trak(job, batch=500):
    from dattri.algorithm.trak import TRAKAttributor

    def margin(params, pair):
        logp = -job.loss(params, pair)
        return logp - torch.log1p(-torch.exp(logp))

    method = TRAKAttributor(
        job.task(margin),
        lambda params, pair: torch.exp(-job.loss(params, pair)),
        projector_kwargs={"proj_dim": 2048, "device": "cpu"},
        regularization=1.0 if job.n < 4096 else 0.0,
    )
    train, query = job.loaders(batch)
    with torch.no_grad():
        method.cache(train)
        return method.attribute(query).T


def dattri_representer(job):
    from dattri.algorithm.rps import RPSAttributor

    method = RPSAttributor(job.task(nn.functional.cross_entropy), "head", False, l2_strength=0.003)
    train, query = job.loaders(2500)
    method.cache(train)
    return method.attribute(train, query).T


def dattri_influence(job, kind, cache=5000, layers=None, batch=2500, **options):
    from dattri.algorithm import influence_function

    method = getattr(influence_function, f"IFAttributor{kind}")(job.task(), layers, **options)
    method.cache(job.loaders(cache)[0])
    return method.attribute(job.loaders(batch)[0], job.loaders(1)[1]).T


def captum_influence(job, kind, **options):
    import captum.influence._core.arnoldi_influence_function as arnoldi
    import captum.influence._core.influence_function as naive

    whole = nn.CrossEntropyLoss(reduction="sum")
    method = (naive.NaiveInfluenceFunction if kind == "Naive" else arnoldi.ArnoldiInfluenceFunction)(
        job.net, job.train, "0", lambda m, c: 1.0, loss_fn=whole, sample_wise_grads_per_batch=True, **options
    )
    return method.influence(job.query.tensors)


def kronfluence(job, size=250):
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    with tempfile.TemporaryDirectory() as folder:
        task = Classification()
        analyzer = Analyzer("speed", prepare_model(job.net, task), task, cpu=True, output_dir=folder, disable_tqdm=True)
        factors = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        analyzer.fit_all_factors("f", job.train, per_device_batch_size=size, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            job.query,
            job.train,
            per_device_query_batch_size=len(job.query),
            per_device_train_batch_size=size,
            score_args=ScoreArguments(damping_factor=None),
        )
        return analyzer.load_pairwise_scores("s")["all_modules"]


JOBS = {
    "similarity/captum": similarity_captum,
    "graddot/dattri": dattri_tracin,
    "graddot/captum": captum_tracin,
    "gradcos/dattri": lambda job: dattri_tracin(job, cosine=True),
    "tracin-128/dattri": lambda job: dattri_tracin(job, size=128),
    "tracin-head/captum": captum_tracin_head,
    "tracin-head/dattri": lambda job: dattri_tracin(job, layers=["head.weight", "head.bias"], batch=2500),
    "trak-2048/traker": traker,
    "trak-2048/dattri": dattri_trak,
    "representer/dattri": dattri_representer,
    # On the whole network it asks for 68 GB with all samples at once, and inverts each batch by itself with fewer.
    "explicit-head/dattri": lambda job: dattri_influence(job.on_features(), "Explicit", regularization=DAMPING),
    "explicit-head/captum": lambda job: captum_influence(
        job.on_features(), "Naive", projection_dim=1010, hessian_reg=DAMPING * job.n, batch_size=2500
    ),
    "cg-head/dattri": lambda job: dattri_influence(job.on_features(), "CG", regularization=DAMPING, max_iter=20),
    # dattri multiplies its damping by the scale.
    "lissa-head/dattri": lambda job: dattri_influence(
        job.on_features(), "LiSSA", batch_size=32, recursion_depth=DEPTH, damping=DAMPING / 10, scaling=10
    ),
    "arnoldi-16/dattri": lambda job: dattri_influence(
        job, "Arnoldi", max(job.n // 5, 1), None, 500, precompute_data_ratio=0.2, proj_dim=16, max_iter=21,
        regularization=1e-3,
    ),
    "arnoldi-16/captum": lambda job: captum_influence(
        job, "Arnoldi", projection_dim=16, arnoldi_dim=20, arnoldi_tol=0.0, batch_size=50,
        hessian_dataset=torch.utils.data.Subset(job.train, range(max(job.n // 5, 1))),
    ),
    "ekfac/kronfluence": kronfluence,
}  # fmt: skip


MODULES = {
    "captum": ["captum.influence", "captum.influence._core.arnoldi_influence_function"],
    "dattri": [f"dattri.algorithm.{name}" for name in ("tracin", "trak", "rps", "influence_function")]
    + ["dattri.func.hessian", "dattri.func.projection", "dattri.task"],
    "traker": ["trak", "trak.projectors"],
    "kronfluence": ["kronfluence.analyzer", "kronfluence.arguments", "kronfluence.task"],
}


def main():
    for module in MODULES[sys.argv[2].split("/")[1]]:
        importlib.import_module(module)
    given, run, out, dtype = np.load(sys.argv[1]), JOBS[sys.argv[2]], sys.argv[3], getattr(torch, sys.argv[4])
    for line in sys.stdin:
        job = Job(given, int(line), dtype)
        start, cpu = time.perf_counter(), time.process_time()
        try:
            scores = run(job)
        except (RuntimeError, MemoryError) as error:
            print(json.dumps({"error": str(error)[:200]}), flush=True)
            continue
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        np.savez(out, scores=scores.detach().numpy())
        print(json.dumps({"seconds": seconds, "cpu": cpu}), flush=True)


if __name__ == "__main__":
    main()
