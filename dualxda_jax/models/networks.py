"""The paper's networks in Flax linen. Inputs are images [b, height, width, channels], floats."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax

from dualxda_jax import _check

Array = jax.Array

HEAD = "head"
"""Name of the final Dense layer of every network here; what `from_linen` takes."""


class SmallCNN(nn.Module):
    """Three VALID 3×3 convolutions (5, 10, 5 channels), Dense 500, Dense 100, head; ReLU after each but the head.

    Source: DualXDA (arXiv 2402.12118), the network for MNIST; 1.3 million parameters at 28×28.

    Attributes:
        num_classes: k, the outputs of the head.
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Images [b, h, w, c] in [0, 1] -> logits [b, k]; h and w 7 or more."""
        if min(x.shape[1:3]) < 7:
            _check.fail("images", f"{x.shape[1]} × {x.shape[2]} pixels", "7 × 7 or more for three 3×3 convolutions")
        for i, channels in enumerate((5, 10, 5)):
            x = nn.relu(nn.Conv(channels, (3, 3), padding="VALID", name=f"conv_{i}")(x))
        x = x.reshape((x.shape[0], -1))
        for i, width in enumerate((500, 100)):
            x = nn.relu(nn.Dense(width, name=f"dense_{i}")(x))
        return nn.Dense(self.num_classes, name=HEAD)(x)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a skip connection (ResNet-18).

    Attributes:
        channels: outputs of the block.
        stride: of its first convolution, and of the projection of the skip if the shape changes.
    """

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[b, h, w, c] -> [b, h/stride, w/stride, channels]."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        strides = (self.stride, self.stride)
        y = nn.Conv(self.channels, (3, 3), strides, padding=1, use_bias=False, name="conv_0")(x)
        y = nn.relu(norm(name="norm_0")(y))
        y = nn.Conv(self.channels, (3, 3), padding=1, use_bias=False, name="conv_1")(y)
        y = norm(name="norm_1")(y)
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), strides, use_bias=False, name="conv_skip")(x)
            x = norm(name="norm_skip")(x)
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    """1×1, 3×3 and 1×1 convolutions around a skip connection; four times as many outputs (ResNet-50).

    Attributes:
        channels: of the 3×3 convolution; the block has 4 · channels outputs.
        stride: of the 3×3 convolution, and of the projection of the skip if the shape changes.
    """

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[b, h, w, c] -> [b, h/stride, w/stride, 4 · channels]."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        strides = (self.stride, self.stride)
        y = nn.Conv(self.channels, (1, 1), use_bias=False, name="conv_0")(x)
        y = nn.relu(norm(name="norm_0")(y))
        y = nn.Conv(self.channels, (3, 3), strides, padding=1, use_bias=False, name="conv_1")(y)
        y = nn.relu(norm(name="norm_1")(y))
        y = nn.Conv(4 * self.channels, (1, 1), use_bias=False, name="conv_2")(y)
        y = norm(name="norm_2")(y)
        if x.shape != y.shape:
            x = nn.Conv(4 * self.channels, (1, 1), strides, use_bias=False, name="conv_skip")(x)
            x = norm(name="norm_skip")(x)
        return nn.relu(x + y)


class _ResNet(nn.Module):
    """The body that both depths share; BatchNorm uses its running statistics unless `train`."""

    num_classes: int = 10
    width: int = 64

    block: type[nn.Module] = BasicBlock
    stages: Sequence[int] = ()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Images [b, h, w, c] -> logits [b, k]; `train` uses the batch's statistics and updates the running ones."""
        x = nn.Conv(self.width, (3, 3), padding=1, use_bias=False, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="stem_norm")(x)
        x = nn.relu(x)
        for s, blocks in enumerate(self.stages):
            for i in range(blocks):
                stride = 2 if s > 0 and i == 0 else 1
                x = self.block(self.width * 2**s, stride, name=f"stage_{s}_block_{i}")(x, train)
        return nn.Dense(self.num_classes, name=HEAD)(x.mean(axis=(1, 2)))


class ResNet18(_ResNet):
    """ResNet-18 with a 3×3 stride-1 stem and no max-pooling: d = 512.

    Source: DualXDA (arXiv 2402.12118), the network for CIFAR-10; He et al. 2016.

    Attributes:
        num_classes: k, the outputs of the head.
        width: channels of the stem, 64 in the paper; d = 8 · width.
        block: the kind of block.
        stages: blocks in each stage.
    """

    stages: Sequence[int] = (2, 2, 2, 2)


class ResNet50(_ResNet):
    """ResNet-50 with a 3×3 stride-1 stem and no max-pooling: d = 2,048.

    Source: DualXDA (arXiv 2402.12118), the network for AwA2; He et al. 2016.

    Attributes:
        num_classes: k, the outputs of the head.
        width: channels of the stem, 64 in the paper; d = 32 · width.
        block: the kind of block.
        stages: blocks in each stage.
    """

    block: type[nn.Module] = BottleneckBlock
    stages: Sequence[int] = (3, 4, 6, 3)
