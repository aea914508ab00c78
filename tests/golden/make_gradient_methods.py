"""Write scores of TracIn, GradDot, GradCos, TRAK and representer points by torch packages on a small CNN.

The CNN has two checkpoints.

Run with an environment that has torch, captum 0.9, dattri 0.3 and traker 0.3.2:

    python tests/golden/make_gradient_methods.py

Weights and inputs are float32 values. dattri and captum compute in float64, traker in float32. Images are channels
first, as torch has them. Scores are [q, n]. No projections: those are random, and everybody draws others.
"""

import pathlib
import tempfile

import numpy as np
import torch
from captum.influence import TracInCP
from dattri.algorithm.rps import RPSAttributor
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.utils import rps_finetune_theta
from dattri.model_util.hook import get_final_layer_io
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trak import TRAKer
from trak.projectors import NoOpProjector
from trak.score_computers import BasicScoreComputer

N, Q, K = 256, 6, 3
RATES = [0.2, 0.05]
REGULARIZATION = 0.5
DECAY = 0.02


def network():
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 5), nn.ReLU(), nn.Linear(5, K)
    ).double()


def trained():
    """Two checkpoints of one training, and the data: images whose brightest row tells the class, mostly."""
    torch.manual_seed(0)
    labels = torch.arange(N + Q) % K
    x = 0.6 * torch.randn(N + Q, 1, 4, 4)
    x[torch.arange(N + Q), 0, labels] += 1.0
    x, model = x.float().double(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    checkpoints = []
    for step in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:N]), labels[:N]).backward()
        optimizer.step()
        if step in (39, 119):
            checkpoints.append({name: value.float().double() for name, value in model.state_dict().items()})
    return checkpoints, x, labels


def by_dattri(checkpoints, rates, cosine, train, queries):
    model = network()

    def loss(params, pair):
        outputs = torch.func.functional_call(model, params, pair[0].unsqueeze(0))
        return nn.functional.cross_entropy(outputs, pair[1].unsqueeze(0))

    task = AttributionTask(model=model, loss_func=loss, checkpoints=checkpoints)
    attributor = TracInAttributor(task=task, weight_list=torch.tensor(rates), normalized_grad=cosine)
    attributor.projector_kwargs = None  # None as an argument takes a projection to 512
    with torch.no_grad():
        return attributor.attribute(*(DataLoader(d, batch_size=64) for d in (train, queries))).T.numpy()


def by_captum(checkpoints, train, queries):
    model = network()

    def load(model, number):
        model.load_state_dict(checkpoints[int(number)])
        return RATES[int(number)]

    tracin = TracInCP(model, train, ["0", "1"], load, loss_fn=nn.CrossEntropyLoss(reduction="none"), batch_size=64)
    scores = tracin.influence(queries.tensors).detach().numpy()
    return scores, tracin.self_influence(DataLoader(train, batch_size=64)).detach().numpy()


def representer_by_dattri(checkpoint, train, queries):
    """Its refit stops early and steps by float32 values of the loss: it is started anew until it stays where it is."""
    model = network()
    task = AttributionTask(model=model, loss_func=nn.functional.cross_entropy, checkpoints=[checkpoint])
    attributor = RPSAttributor(task, "5", normalize_preactivate=False, l2_strength=DECAY)
    loaders = [DataLoader(d, batch_size=N) for d in (train, queries)]
    points, outputs = (a.detach() for a in get_final_layer_io(model, "5", loaders[0], "cpu"))
    theta = model[5].weight.data.clone()
    for _ in range(3):
        theta = rps_finetune_theta(points, outputs, theta.clone(), nn.functional.cross_entropy, DECAY, 1000).detach()
    attributor.full_train_dataloader, attributor.finetuned_theta = loaders[0], theta
    return attributor.attribute(*loaders).T.detach().numpy()


class Unscaled(BasicScoreComputer):
    """Without the division of each checkpoint's inverse kernel by its mean absolute entry; inverted in float64."""

    def get_x_xtx_inv(self, grads, xtx):
        kernel = grads.double().T @ grads.double() + self.lambda_reg * torch.eye(grads.shape[1]).double()
        return (grads.double() @ torch.linalg.inv(kernel)).float()


def by_traker(checkpoints, train, queries):
    model = network().float()
    parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=model,
            task="image_classification",
            train_set_size=N,
            save_dir=folder,
            device="cpu",
            projector=NoOpProjector(device="cpu"),
            score_computer=Unscaled,
            proj_dim=parameters,
            # Gradients of margins are dependent; traker divides them by the root of the number of parameters.
            lambda_reg=REGULARIZATION / parameters,
            use_half_precision=False,
        )
        single = [{k: v.float() for k, v in c.items()} for c in checkpoints]
        for number, checkpoint in enumerate(single):
            traker.load_checkpoint(checkpoint, model_id=number)
            for x, y in DataLoader(train, batch_size=64):
                traker.featurize(batch=[x.float(), y], num_samples=len(x))
        traker.finalize_features()
        for number, checkpoint in enumerate(single):
            traker.start_scoring_checkpoint("golden", checkpoint, number, num_targets=Q)
            traker.score(batch=[queries.tensors[0].float(), queries.tensors[1]], num_samples=Q)
        return np.array(traker.finalize_scores("golden")).T


if __name__ == "__main__":
    checkpoints, x, labels = trained()
    train, queries = TensorDataset(x[:N], labels[:N]), TensorDataset(x[N:], labels[N:])
    scores, influence = by_captum(checkpoints, train, queries)
    arrays = {
        "tracin/captum": scores,
        "tracin/dattri": by_dattri(checkpoints, RATES, False, train, queries),
        "graddot/dattri": by_dattri(checkpoints[-1:], [1.0], False, train, queries),
        "gradcos/dattri": by_dattri(checkpoints[-1:], [1.0], True, train, queries),
        "representer/dattri": representer_by_dattri(checkpoints[-1], train, queries),
        "trak/traker": by_traker(checkpoints, train, queries),
        "trak_one/traker": by_traker(checkpoints[-1:], train, queries),
    }
    arrays = {f"scores/{name}": value.astype(np.float32) for name, value in arrays.items()}
    for number, checkpoint in enumerate(checkpoints):
        arrays |= {f"weights/{number}/{name}": v.numpy().astype(np.float32) for name, v in checkpoint.items()}
    arrays |= {"x": x.numpy().astype(np.float32), "labels": labels.numpy(), "rates": np.array(RATES, np.float32)}
    path = pathlib.Path(__file__).parent / "gradient_methods.npz"
    np.savez_compressed(path, **arrays, **{"self_influence/tracin/captum": influence.astype(np.float32)})
