"""Write relevance maps of zennit (torch) on small networks with random weights, one file for each network.

Run with an environment that has torch, torchvision and zennit 0.5.1:

    python tests/golden/make_zennit.py [cnn] [resnet] [mixed] [unmerged] [resnet_full] [--to FOLDER]

Weights are float32 values, everything is computed in float64. Images are channels first, as torch has them. Each map
is the gradient that a composite leaves at the input when the seed arrives at the output.
"""

import argparse
import pathlib

import numpy as np
import torch
from torchvision.models.resnet import BasicBlock, ResNet
from zennit import composites, rules
from zennit.canonizers import NamedMergeBatchNorm
from zennit.torchvision import ResNetCanonizer
from zennit.types import Linear

HERE = pathlib.Path(__file__).parent


def with_composite(name, zero_params):
    common = {"zero_params": zero_params}
    if name == "epsilon":
        layers = [*composites.layer_map_base(), (Linear, rules.Epsilon(**common))]
        return lambda canonizers: composites.LayerMapComposite(layers, canonizers=canonizers)
    if name == "epsilon_gamma_box":
        return lambda canonizers: composites.EpsilonGammaBox(low=-3.0, high=3.0, canonizers=canonizers, **common)
    if name == "guided_backprop":
        return lambda canonizers: composites.GuidedBackprop(canonizers=canonizers)
    cls = "".join(part.capitalize() for part in name.split("_"))
    return lambda canonizers: getattr(composites, cls)(canonizers=canonizers, **common)


NAMES = [
    "epsilon",
    "epsilon_plus",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
    "excitation_backprop",
    "guided_backprop",
]


def maps(model, x, seed, canonizers=None):
    """One array for each composite, with biases kept and zeroed."""
    found = {}
    for name in NAMES:
        for bias, zero_params in (("kept", None), ("zero", "bias")):
            composite = with_composite(name, zero_params)(canonizers() if canonizers else None)
            with composite.context(model) as modified:
                data = x.clone().requires_grad_(True)
                (relevance,) = torch.autograd.grad(modified(data), data, seed)
            found[f"map/{name}/{bias}"] = relevance.detach().numpy()
    return found


def rounded(model, scale_bias):
    """Random weights that float32 can hold, biases large enough to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("bias"):
                parameter.copy_(scale_bias * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.float().double())
    return model


def rounding(model, x, seed, canonizers=None):
    """Error of zennit's own float32 maps, as a share of the largest relevance: an activation near zero leaves none."""
    exact = maps(model, x, seed, canonizers)
    rough = maps(model.float(), x.float(), seed.float(), canonizers)
    model.double()
    return {k: np.abs(rough[k] - exact[k]).max() / np.abs(exact[k]).max() for k in exact}


def cnn(attempt):
    torch.manual_seed(attempt)
    layers = []
    for before, after in ((3, 5), (5, 10), (10, 5)):
        layers += [torch.nn.Conv2d(before, after, 3), torch.nn.ReLU()]
    layers += [torch.nn.Flatten(), torch.nn.Linear(45, 24), torch.nn.ReLU(), torch.nn.Linear(24, 12), torch.nn.ReLU()]
    model = rounded(torch.nn.Sequential(*layers).double(), 0.1).eval()
    x = torch.randn(2, 3, 9, 9).float().double()
    # Also relevance where a feature is zero, in proportion to what the last ReLU got.
    seed = (torch.randn(2, 12) * model[:-1](x).abs()).detach().float().double()
    return model, x, seed, None


def resnet(attempt, widths=(4, 6, 8, 10), size=12):
    """A ResNet-18 (3×3 stem of stride 1), in evaluation mode."""
    torch.manual_seed(attempt)
    model = ResNet(BasicBlock, [2, 2, 2, 2])
    model.conv1 = torch.nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
    model.bn1 = torch.nn.BatchNorm2d(widths[0])
    model.maxpool = torch.nn.Identity()
    model.inplanes = widths[0]
    for i, channels in enumerate(widths):
        setattr(model, f"layer{i + 1}", model._make_layer(BasicBlock, channels, 2, stride=1 if i == 0 else 2))
    model.fc = torch.nn.Identity()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # zennit 0.5.1 leaves the merged BatchNorm in place as v / sqrt(1 + eps): with a tiny eps that is v.
            module.eps = 1e-12
            module.running_mean.normal_(std=0.02)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, -1.0, 1.5)
    model = rounded(model.double(), 0.02).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.copy_(module.running_mean.float())
            module.running_var.copy_(module.running_var.float())
    x = torch.randn(1, 3, size, size).float().double()
    seed = (torch.randn(1, widths[-1]) * model(x)).detach().float().double()
    return model, x, seed, lambda: [ResNetCanonizer()]


class Mixed(torch.nn.Module):
    """What VGG, DenseNet and MobileNet are made of: maximum and average pooling, concatenation, strided, grouped,
    dilated and depthwise convolutions, two dense layers."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.grow = nn.Conv2d(6, 4, 3, padding=2, dilation=2, groups=2, bias=False)
        self.relu = nn.ReLU()
        self.deep = nn.Conv2d(10, 10, 3, stride=2, padding=1, groups=10, bias=False)
        self.deep_norm = nn.BatchNorm2d(10, eps=1e-12)
        self.point = nn.Conv2d(10, 8, 1)
        self.tail = nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 10), nn.ReLU())
        self.last = nn.Sequential(nn.Linear(10, 6), nn.ReLU())

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.relu(self.grow(x))], dim=1)
        x = self.point(self.relu(self.deep_norm(self.deep(x))))
        return self.last(self.tail(x))


def mixed(attempt):
    torch.manual_seed(attempt)
    model = Mixed()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, -1.0, 1.5)
    model = rounded(model.double(), 0.1).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.copy_(module.running_mean.float())
            module.running_var.copy_(module.running_var.float())
    x = torch.randn(2, 3, 8, 8).float().double()
    seed = (torch.randn(2, 6) * model(x)).detach().float().double()
    return model, x, seed, lambda: [NamedMergeBatchNorm([(["deep"], "deep_norm")])]


def unmerged(attempt):
    """BatchNorm between two activations, where nothing can merge it, and ReLU6, saturated at a third of its entries."""
    torch.manual_seed(attempt)
    nn = torch.nn
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6, eps=1e-12), nn.ReLU6(), nn.Conv2d(6, 5, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(5, 4)).double()
    norm = model[2]
    norm.running_mean.uniform_(0.1, 0.9)
    norm.running_var.uniform_(0.05, 0.5)
    torch.nn.init.uniform_(norm.weight, 2.0, 4.0)
    norm.weight.data[::2] *= -1
    model = rounded(model, 1.0).eval()
    norm.running_mean.copy_(norm.running_mean.float())
    norm.running_var.copy_(norm.running_var.float())
    x = torch.randn(2, 3, 6, 6).float().double()
    seed = (torch.randn(2, 4) * model(x)).detach().float().double()
    return model, x, seed, None


def resnet_full(attempt):
    """The ResNet-18 of CIFAR-10; too large to keep (see benchmarks/parity.py)."""
    return resnet(attempt, (64, 128, 256, 512), 32)


def write(network, folder):
    for attempt in range(100):
        model, x, seed, canonizers = NETWORKS[network](attempt)
        own = rounding(model, x, seed, canonizers)
        # Where there are many activations, some are always near zero: what is compared says how far float32 gets.
        if network not in KEPT or max(own.values()) <= 6e-5:
            break
    print(network, "from seed", attempt)
    arrays = {f"weights/{k}": v.numpy().astype(np.float32) for k, v in model.state_dict().items() if v.ndim}
    arrays |= {"x": x.numpy(), "seed": seed.numpy(), "features": model(x).detach().numpy()}
    if network not in KEPT:
        arrays |= {f"float32/{k}": v for k, v in own.items()}
    np.savez_compressed(folder / f"zennit_{network}.npz", **arrays, **maps(model, x, seed, canonizers))


NETWORKS = {"cnn": cnn, "resnet": resnet, "mixed": mixed, "unmerged": unmerged}
KEPT = list(NETWORKS)
NETWORKS["resnet_full"] = resnet_full

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=KEPT)
    parser.add_argument("--to", type=pathlib.Path, default=HERE)
    options = parser.parse_args()
    for network in options.networks:
        write(network, options.to)
