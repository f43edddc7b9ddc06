"""How images are prepared for a network: flattened, standardised, padded, in three channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

#: Maps the name of a data set, its training and its test images, uint8 (N, H, W) or (N, H, W, 3), to the
#: inputs of a network, float32, for both.
Look = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]

Values = tuple[float, ...]

_CIFAR = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)

# Mean and standard deviation of each channel in the paper's code, for grey images with their margin. There
# CIFAR-100 has those of CIFAR-10, and mini-ImageNet those of ImageNet.
STATISTICS: dict[str, tuple[Values, Values]] = {
    "mnist": ((0.1,), (0.2752,)),
    "fashion_mnist": ((0.2190,), (0.3318,)),
    "notmnist": ((0.4254,), (0.4501,)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "mini_imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def upright(_name: str, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Scale images (N, H, W) or (N, H, W, 3) to [0, 1]."""
    return train / 255.0, test / 255.0


def flat(name: str, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten images to (N, pixels), in [0, 1]."""
    return upright(name, train.flatten(1), test.flatten(1))


def standardised(name: str, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten images, with mean 0 and deviation 1 over all pixels of the training set."""
    train, test = flat(name, train, test)
    deviation, mean = torch.std_mean(train)
    return (train - mean) / deviation, (test - mean) / deviation


def padded(name: str, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Pad images to 32x32 in black, normalise them by :data:`STATISTICS` and flatten them."""
    return _padded(name, train).flatten(1), _padded(name, test).flatten(1)


def coloured(name: str, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Pad and normalise images likewise, to (N, 3, H, W); grey images have three equal channels."""
    # Grey images are stored once: the channels are a view, copied when a batch is read.
    return _padded(name, train).expand(-1, 3, -1, -1), _padded(name, test).expand(-1, 3, -1, -1)


def _padded(name: str, images: Tensor) -> Tensor:
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    margin = max(0, 32 - images.shape[-1]) // 2
    mean, deviation = (torch.tensor(values)[:, None, None] for values in STATISTICS[name])
    return F.pad(images.contiguous() / 255.0, [margin] * 4).sub_(mean).div_(deviation)
