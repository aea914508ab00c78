"""The other side of benchmarks/relevance.py: zennit on the same networks, in an environment with torch and zennit.

It prints "ready" and then, for each line "NETWORK COMPOSITE PAIRS SIZE WIDTH" on its standard input, the seconds of one
pass (wall and processor time): both maps of that many pairs, rules registered and BatchNorm merged beforehand.
"""

import functools
import sys
import time

import torch
from torchvision.models.resnet import BasicBlock, ResNet
from zennit import composites
from zennit.torchvision import ResNetCanonizer


def small_cnn(size, width):
    layers, channels = [], 1
    for after in (5, 10, 5):
        layers += [torch.nn.Conv2d(channels, after, 3), torch.nn.ReLU()]
        channels = after
    flat = 5 * (size - 6) ** 2
    layers += [torch.nn.Flatten(), torch.nn.Linear(flat, 500), torch.nn.ReLU(), torch.nn.Linear(500, 100)]
    return torch.nn.Sequential(*layers, torch.nn.ReLU()).eval(), 1, None


def resnet18(size, width):
    model = ResNet(BasicBlock, [2, 2, 2, 2])
    model.conv1 = torch.nn.Conv2d(3, width, 3, padding=1, bias=False)
    model.bn1 = torch.nn.BatchNorm2d(width)
    model.maxpool = torch.nn.Identity()
    model.inplanes = width
    for i in range(4):
        setattr(model, f"layer{i + 1}", model._make_layer(BasicBlock, width * 2**i, 2, stride=1 if i == 0 else 2))
    model.fc = torch.nn.Identity()
    return model.eval(), 3, [ResNetCanonizer()]


@functools.cache
def prepare(network, composite, size, width):
    torch.manual_seed(0)
    model, channels, canonizers = {"cnn": small_cnn, "resnet18": resnet18}[network](size, width)
    name = "".join(part.capitalize() for part in composite.split("_"))
    rules = getattr(composites, name)(canonizers=canonizers, zero_params="bias")
    rules.register(model)  # stays registered: this costs the passes nothing
    return model, channels


def explain(model, x_test, x_train):
    x = torch.cat([x_test, x_train]).requires_grad_(True)
    features = model(x)
    test, train = features.detach().chunk(2)
    seed = (test * train).repeat(2, 1)
    return torch.autograd.grad(features, x, seed)


def main():
    print("ready", torch.get_num_threads(), torch.__version__, flush=True)
    for line in sys.stdin:
        network, composite, *numbers = line.split()
        pairs, size, width = map(int, numbers)
        model, channels = prepare(network, composite, size, width)
        x = torch.randn(2, pairs, channels, size, size)
        wall, processor = time.perf_counter(), time.process_time()
        explain(model, *x)
        print(time.perf_counter() - wall, time.process_time() - processor, flush=True)


if __name__ == "__main__":
    main()
