"""Small networks that use parameters in many ways, with and without rules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Apply(nn.Module):
    """Applies a function as a layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.again(self.first(x).tanh()).tanh()).tanh())


class ConvUsedTwice(nn.Module):
    """Uses one convolution twice, on images of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 2, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(input=self.conv(x).tanh()).flatten(2).mean(2))


class Tied(nn.Module):
    """Two layers share a weight; the weight of a third is also used outside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed, self.bare = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.unembed.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.unembed(self.embed(x).tanh())
        return self.bare(x.tanh()) + F.linear(x.sin(), self.bare.weight)


class HiddenUse(nn.Module):
    """One layer is called; of the other, only the parameters are used."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.unseen = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(x) * F.linear(x, self.unseen.weight, self.unseen.bias)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x.transpose(0, 1)).tanh().mean(0))


class FlatInside(nn.Module):
    """Treats every position as a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2]).mean(1))


class Tokens(nn.Module):
    """An embedding and an encoder layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.3)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.embedding(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.last = kind(4, 5, batch_first=True, num_layers=2, dropout=0.2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x)[0][:, -1])


class Bare(nn.Module):
    """Parameters outside layers, one of them unused."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5) + 0.5)
        self.shift = nn.Parameter(torch.tensor(0.3))
        self.unused = nn.Parameter(torch.ones(2))
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x * self.scale + self.shift).tanh())


class DataDependent(nn.Module):
    """Reads the values of its tensors, which ``vmap`` does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.rand(5) + 0.5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = [row * self.scale if row.sum() > 0 else row * self.scale**2 for row in x]
        return self.last(torch.stack(rows))


class HeldBesides(nn.Module):
    """Uses a parameter through a list, so that replacing the module's parameter has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.rand(5) + 0.5), nn.Linear(5, 3)
        self.held = [self.scale]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x * self.held[0])

    def double(self) -> HeldBesides:
        super().double()
        self.held = [self.scale]
        return self


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(left) * self.right(right)


def _pooled(*layers: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), Apply(lambda x: x.flatten(2).mean(2)), nn.Linear(channels, 3))


def _padded(mode: str, padding: Any = (2, 1)) -> nn.Module:
    return _pooled(nn.Conv2d(2, 4, 3, padding=padding, padding_mode=mode), channels=4)


def _batch_norm() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    network(torch.randn(16, 2, 8, 8))
    return network


_image = (2, 8, 8)
# By name: how to make the network, and the shape of one sample of each input.
NETWORKS: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), ((5,),)),
    "mlp without bias": (
        lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)),
        ((5,),),
    ),
    "in-place relu": (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(True), nn.Linear(7, 3)), ((5,),)),
    "in-place relu on a sequence": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(True), Apply(lambda x: x.mean(1)), nn.Linear(7, 3)),
        ((4, 5),),
    ),
    "conv2d": (
        lambda: _pooled(
            nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, groups=2, bias=False),
            channels=6,
        ),
        (_image,),
    ),
    "conv2d to one position": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 8, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)),
        (_image,),
    ),
    "zeros": (lambda: _padded("zeros"), (_image,)),
    "reflect": (lambda: _padded("reflect"), (_image,)),
    "replicate": (lambda: _padded("replicate"), (_image,)),
    "circular": (lambda: _padded("circular"), (_image,)),
    "same": (lambda: _padded("zeros", "same"), (_image,)),
    "same, reflect": (lambda: _padded("reflect", "same"), (_image,)),
    "valid": (lambda: _padded("zeros", "valid"), (_image,)),
    "conv1d": (
        lambda: _pooled(nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2, groups=2), channels=4),
        ((2, 12),),
    ),
    "conv3d": (
        lambda: _pooled(nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=1), channels=4),
        ((2, 4, 5, 6),),
    ),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Apply(lambda x: x.mean((1, 2))), nn.Linear(6, 3)),
        ((3, 2, 4),),
    ),
    "used twice": (UsedTwice, ((5,),)),
    "conv used twice": (ConvUsedTwice, (_image,)),
    "tied": (Tied, ((5,),)),
    "hidden use": (HiddenUse, ((5,),)),
    "sequence first": (SequenceFirst, ((3, 4),)),
    "sequence first, as long as the probe": (SequenceFirst, ((2, 4),)),
    "flat inside": (FlatInside, ((3, 4),)),
    "gru": (lambda: Recurrent(nn.GRU), ((6, 4),)),
    "lstm": (lambda: Recurrent(nn.LSTM), ((6, 4),)),
    "bare": (Bare, ((5,),)),
    "data dependent": (DataDependent, ((5,),)),
    "held besides": (HeldBesides, ((5,),)),
    "two inputs": (TwoInputs, ((5,), (4,))),
    "batch norm": (_batch_norm, (_image,)),
    "group and layer norm": (
        lambda: _pooled(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.LayerNorm([4, 6, 6]), channels=4),
        (_image,),
    ),
    "transposed convolution": (lambda: _pooled(nn.ConvTranspose2d(2, 4, 3), channels=4), (_image,)),
    "weight norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)), nn.Tanh(), nn.Linear(7, 3)
        ),
        ((5,),),
    ),
}
