"""The networks of the benchmarks, and the classifier that trains them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Return linear layers with ReLU of these sizes, from inputs to features, without a head."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)


def flattening_mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Return the same for images, which are flattened first."""
    return nn.Sequential(nn.Flatten(), mlp(sizes))


class Dropout(nn.Dropout):
    """Dropout from uniform random numbers, which a CPU draws three times as fast as Bernoulli ones."""

    def forward(self, x: Tensor) -> Tensor:
        """Set a share p of the values to 0 and scale the others by 1/(1 − p), in training."""
        return x * torch.rand_like(x).ge_(self.p).div_(1 - self.p) if self.training else x


def alexnet(
    width: float = 1.0, size: int = 32, hidden: Sequence[int] | None = None, dropout: float = 0.2
) -> nn.Sequential:
    """Return the AlexNet of the paper without a head: (3, 32, 32) to 2,048, 6.5 M parameters.

    Args:
        width: A factor for the number of channels.
        size: Height and width of the images, at least 32; the kernels grow with it.
        hidden: The sizes of the hidden layers, the last of which is the output; by default two of 2,048,
            scaled by the width.
        dropout: The share dropped after the last convolution and after the hidden layers.

    Returns:
        The layers.
    """
    channels = [3, *(round(width * size) for size in (64, 128, 256))]
    layers: list[nn.Module] = []
    for i, (kernel, share) in enumerate(((size // 8, 0.2), (size // 10, 0.2), (2, dropout))):
        layers += [
            nn.Conv2d(channels[i], channels[i + 1], kernel),
            nn.ReLU(),
            Dropout(share),
            nn.MaxPool2d(2),
        ]
        size = (size - kernel + 1) // 2
    layers.append(nn.Flatten())
    inputs = channels[-1] * size**2
    for outputs in hidden or 2 * [round(width * 2048)]:
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), Dropout(dropout)]
        inputs = outputs
    return nn.Sequential(*layers)


def _normalised(
    inputs: int, outputs: int, kernel: int, stride: int = 1, affine: bool = True
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs, affine=affine),
    )


class Residual(nn.Module):
    """A block of a ResNet with a shortcut: two 3x3 convolutions, or one between two 1x1 (a bottleneck)."""

    def __init__(
        self, inputs: int, width: int, outputs: int, stride: int, bottleneck: bool, affine: bool = True
    ) -> None:
        super().__init__()
        sizes = (inputs, width, width, outputs) if bottleneck else (inputs, width, outputs)
        kernels, strides = ((1, 3, 1), (1, stride, 1)) if bottleneck else ((3, 3), (stride, 1))
        layers: list[nn.Module] = []
        for layer in zip(sizes, sizes[1:], kernels, strides, strict=False):
            layers += [_normalised(*layer, affine=affine), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _normalised(inputs, outputs, 1, stride, affine)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the ReLU of the sum of both branches."""
        total: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return total


def _stages(
    stem: nn.Module, width: int, depths: Iterable[int], bottleneck: bool, affine: bool = True
) -> tuple[list[nn.Module], int]:
    """Return the layers of a ResNet from stem to before the pool, and their number of output channels."""
    layers: list[nn.Module] = [stem, nn.ReLU(inplace=True)]
    inputs = width
    for stage, depth in enumerate(depths):
        inside = width * 2**stage
        outputs = inside * 4 if bottleneck else inside
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Residual(inputs, inside, outputs, stride, bottleneck, affine))
            inputs = outputs
    return layers, inputs


class ResNet(nn.Sequential):
    """A ResNet with its head.

    Args:
        stem: Maps images to ``width`` channels.
        width: The number of channels in the first stage, doubled in each further one.
        depths: The number of blocks in each stage.
        bottleneck: Whether blocks have a bottleneck, with four times as many outputs.
        classes: The number of outputs of the head.
    """

    def __init__(
        self, stem: nn.Module, width: int, depths: Iterable[int], bottleneck: bool, classes: int
    ) -> None:
        stages, outputs = _stages(stem, width, depths, bottleneck)
        super().__init__(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, classes))


def resnet18(width: int = 64, classes: int = 10) -> ResNet:
    """Return a ResNet-18 with a head for images of the size of CIFAR: (3, 32, 32), 11.2 M parameters."""
    return ResNet(_normalised(3, width, 3), width, (2, 2, 2, 2), bottleneck=False, classes=classes)


def mini_imagenet_resnet18(width: float = 1.5) -> nn.Sequential:
    """Return the ResNet-18 of the paper's mini-ImageNet experiment without a head: (3, 84, 84) to 768.

    Its stem halves the image, its normalisation layers have no parameters, and its pool covers the first four
    of the last six rows and columns. 25.1 M parameters.

    Args:
        width: A factor for the number of channels, including the 512 outputs.

    Returns:
        The layers.
    """
    channels = int(64 * width)
    stem = _normalised(3, channels, 3, 2, affine=False)
    stages, _ = _stages(stem, channels, (2, 2, 2, 2), bottleneck=False, affine=False)
    return nn.Sequential(*stages, nn.AvgPool2d(4), nn.Flatten())


def resnet50(classes: int = 1000) -> ResNet:
    """Return a ResNet-50 with a head for ImageNet: (3, 224, 224), 25.6 M parameters."""
    stem = nn.Sequential(_normalised(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
    return ResNet(stem, 64, (3, 4, 6, 3), bottleneck=True, classes=classes)


class Attending(nn.Module):
    """A block of a transformer: self-attention and an MLP, each after a norm and with a shortcut."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, positions, dim) to the same shape."""
        qkv = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1))
        attended = F.scaled_dot_product_attention(*qkv.transpose(1, 3).unbind(2))
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class ViT(nn.Module):
    """A vision transformer with its head."""

    def __init__(self, size: int, patch: int, dim: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(Attending(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, computed from the class token."""
        patches = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


def vit(
    size: int = 32, patch: int = 4, dim: int = 192, depth: int = 6, heads: int = 3, classes: int = 10
) -> ViT:
    """Return half a ViT-Tiny with a head for images of the size of CIFAR: (3, 32, 32), 2.7 M parameters."""
    return ViT(size, patch, dim, depth, heads, classes)


def vit_small(classes: int = 10) -> ViT:
    """Return a ViT-Small with a head for images of the size of CIFAR: (3, 32, 32), 21.3 M parameters."""
    return vit(dim=384, depth=12, heads=6, classes=classes)


class Classifier(pl.LightningModule):
    """An ordinary classifier, trained by cross-entropy.

    Args:
        body: Maps inputs to features.
        head: Maps features to logits: a Linear layer, or heads per task.
        optimizer: Makes the optimizer from the parameters.
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self._make_optimizer = optimizer

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; skip the checks of a module for the one that Lightning sets 44 times per step."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.body(x))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the accuracy on the loader's task."""
        x, y = batch
        logits = self(x)
        accuracy = multiclass_accuracy(logits, y, num_classes=logits.shape[1], average="micro")
        self.log("val_acc", accuracy, batch_size=len(y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return self._make_optimizer(self.parameters())
