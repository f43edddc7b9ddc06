"""One small network for every layer and every use of a parameter that has a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.fisher.networks import Apply

SAMPLES = 7


class Pooled(nn.Module):
    """Averages a layer's output over all dimensions but samples and ``dim``, and classifies it."""

    def __init__(self, layer: nn.Module, features: int, dim: int = 1) -> None:
        super().__init__()
        self.layer, self.last, self.dim = layer, nn.Linear(features, 3), dim

    def forward(self, *inputs: Tensor) -> Tensor:
        x = self.layer(*inputs)
        x = x[0] if isinstance(x, tuple) else x
        return self.last(x.movedim(self.dim, 1).flatten(2).tanh().mean(2) if x.ndim > 2 else x.tanh())


class Tokens(nn.Module):
    """A class token, a sliced positional embedding, LayerScale and a learned mask token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(9, 4))
        self.scale, self.mask = nn.Parameter(torch.rand(4)), nn.Parameter(torch.randn(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(x[..., :1] > 0.5, self.mask, x)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.position[: x.shape[1]]
        return x + self.scale * self.inner(x)


class LowRank(nn.Module):
    """Low-rank factors as parameters outside layers, on both sides of a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 5).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 5))
        self.left = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.left @ (self.frozen(x) + (x @ self.a) @ self.b)


class Arithmetic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.rand(4) + 0.5 for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g = self.parts
        x = (a - x * b) / c + d / (x.square() + 1) - torch.sub(x, e, alpha=2)
        x += f
        return torch.add(x, g.exp(), alpha=0.5)


class Windows(nn.Module):
    """Folds positions into the batch dimension, inside and outside of it, and indexes a table."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.LayerNorm(4)
        self.table = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("index", torch.tensor([0, 3, 3, 1, 4, 0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        x = self.outer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], len(x)))
        return x.transpose(0, 1) + self.table[self.index]


class Written(nn.Module):
    """Writes samples in place into a tensor that is computed from a buffer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.rand(4)), nn.Linear(4, 3)
        self.register_buffer("empty", torch.zeros(SAMPLES, 4))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.empty[: len(x)].clone()
        rows += x
        return self.last((rows * self.scale).tanh())


class Places(nn.Module):
    """Adds a table of positions, looked up by ``torch.arange``."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions(torch.arange(x.shape[1]))


class Packed(nn.Module):
    """Packed sequences of different lengths, which have no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.last(self.rnn(packed)[1][-1])


class Steps(nn.Module):
    """Runs a recurrent cell step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Checkpointed(nn.Module):
    """Computes activations again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        again = torch.utils.checkpoint.checkpoint
        return self.last(again(lambda x: self.inner(x).tanh(), x, use_reentrant=False))


class ScaledSum(nn.Module):
    """``addmm`` with both of its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.weight = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight, beta=2, alpha=0.5)


class Exponent(nn.Module):
    """A power and an ``einsum``, which have no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent, self.weight = nn.Parameter(torch.rand(5) + 1), nn.Parameter(torch.rand(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,io->bo", x.abs() ** self.exponent, self.weight)


class HeldExponent(nn.Module):
    """A power whose exponent is used through a list, so that ``torch.func`` cannot replace it."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent, self.last = nn.Parameter(torch.rand(5) + 1), nn.Linear(5, 3)

    def double(self) -> HeldExponent:
        super().double()
        self.held = [self.exponent]
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.abs() ** self.held[0])


def _padded_tokens() -> Tensor:
    """Return tokens of which the first sample has only the padding, 2."""
    tokens = torch.randint(6, (SAMPLES, 5))
    tokens[0] = 2
    return tokens


def _attention(**options: Any) -> nn.Module:
    return Pooled(nn.MultiheadAttention(4, 2, **options), 4, dim=2 if options.get("batch_first") else 0)


class SequenceFirstAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(4, 2, **options), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.last(self.attention(x, x, x)[0].mean(0))


def _recurrent(layer: nn.RNNBase) -> nn.Module:
    width = layer.proj_size or layer.hidden_size
    return Pooled(layer, width * (2 if layer.bidirectional else 1), dim=2)


def _conv(layer: nn.Module) -> nn.Module:
    return Pooled(layer, layer.out_channels)


def _floats(*shape: int) -> Callable[[], Any]:
    return lambda: torch.randn(SAMPLES, *shape, dtype=torch.float64)


def _tokens(*shape: int) -> Callable[[], Any]:
    return lambda: torch.randint(6, (SAMPLES, *shape))


def _normed(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.randn_like(parameter)
    return Pooled(layer, 4)


class WeightedBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(6, 4, mode="sum", padding_idx=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bag(x, per_sample_weights=x.double().cos()).tanh())


def _two(*shapes: tuple[int, ...]) -> Callable[[], Any]:
    return lambda: tuple(torch.randn(SAMPLES, *shape, dtype=torch.float64) for shape in shapes)


_image, _sequence = (4, 5, 6), (6, 4)

# By name: how to make the network, and how to make its inputs.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "conv transpose 1d": (lambda: _conv(nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1)), _floats(4, 5)),
    "conv transpose 2d": (
        lambda: _conv(
            nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2, dilation=(1, 2), bias=False)
        ),
        _floats(*_image),
    ),
    "conv transpose 3d": (lambda: _conv(nn.ConvTranspose3d(4, 2, 2, stride=2)), _floats(4, 2, 3, 2)),
    "conv of few positions": (lambda: _conv(nn.Conv2d(4, 6, (4, 5))), _floats(*_image)),
    "dilated same conv": (lambda: _conv(nn.Conv1d(4, 6, 3, padding="same", dilation=3)), _floats(4, 9)),
    "embedding": (
        lambda: Pooled(nn.Embedding(6, 4, padding_idx=-1), 4, dim=2),
        _tokens(5),
    ),
    "embedding of one token": (lambda: Pooled(nn.Embedding(6, 4), 4), _tokens()),
    "embedding bag": (lambda: Pooled(nn.EmbeddingBag(6, 4, padding_idx=2), 4), _tokens(5)),
    "embedding bag of padding": (lambda: Pooled(nn.EmbeddingBag(6, 4, padding_idx=2), 4), _padded_tokens),
    "weighted embedding bag": (WeightedBag, _tokens(5)),
    "layer norm": (lambda: _normed(nn.LayerNorm([4, 5])), _floats(4, 5)),
    "layer norm without bias": (lambda: _normed(nn.LayerNorm(5, bias=False)), _floats(4, 5)),
    "rms norm": (lambda: _normed(nn.RMSNorm(5)), _floats(4, 5)),
    "group norm": (lambda: _normed(nn.GroupNorm(2, 4)), _floats(*_image)),
    "instance norm": (lambda: _normed(nn.InstanceNorm2d(4, affine=True)), _floats(*_image)),
    "tracking instance norm": (
        lambda: _normed(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
        _floats(4, 5),
    ),
    "batch norm": (lambda: _normed(nn.BatchNorm2d(4)), _floats(*_image)),
    "batch norm of features": (lambda: _normed(nn.BatchNorm1d(4)), _floats(4)),
    "prelu": (lambda: Pooled(nn.PReLU(4), 4), _floats(*_image)),
    "prelu of one slope": (lambda: Pooled(nn.PReLU(), 4), _floats(4)),
    "bilinear": (lambda: Pooled(nn.Bilinear(3, 4, 5), 5), _two((3,), (4,))),
    "bilinear along a sequence": (lambda: Pooled(nn.Bilinear(3, 4, 5), 5, dim=2), _two((6, 3), (6, 4))),
    "attention": (lambda: _attention(batch_first=True), _two(_sequence, (5, 4), (5, 4))),
    "attention to keys of other widths": (
        lambda: _attention(batch_first=True, kdim=3, vdim=2),
        _two(_sequence, (5, 3), (5, 2)),
    ),
    "self-attention, sequence first": (
        lambda: SequenceFirstAttention(add_bias_kv=True, add_zero_attn=True),
        _floats(*_sequence),
    ),
    "rnn": (lambda: _recurrent(nn.RNN(4, 5, batch_first=True, nonlinearity="relu")), _floats(*_sequence)),
    "tanh rnn without bias": (
        lambda: _recurrent(nn.RNN(4, 5, batch_first=True, bias=False)),
        _floats(*_sequence),
    ),
    "gru": (
        lambda: _recurrent(nn.GRU(4, 5, num_layers=2, batch_first=True, bidirectional=True)),
        _floats(*_sequence),
    ),
    "lstm": (
        lambda: _recurrent(
            nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True, proj_size=3, bias=False)
        ),
        _floats(*_sequence),
    ),
    "rnn cell": (lambda: Pooled(Steps(nn.RNNCell(4, 5)), 5), _floats(*_sequence)),
    "relu rnn cell": (lambda: Pooled(Steps(nn.RNNCell(4, 5, nonlinearity="relu")), 5), _floats(*_sequence)),
    "gru cell": (lambda: Pooled(Steps(nn.GRUCell(4, 5)), 5), _floats(*_sequence)),
    "lstm cell": (lambda: Pooled(Steps(nn.LSTMCell(4, 5, bias=False)), 5), _floats(*_sequence)),
    "tokens": (lambda: Pooled(Tokens(), 4, dim=2), _floats(*_sequence)),
    "low rank": (lambda: Pooled(LowRank(), 5, dim=2), _floats(3, 4)),
    "scaled sum": (lambda: Pooled(ScaledSum(), 6), _floats(4)),
    "arithmetic": (lambda: Pooled(Arithmetic(), 4), _floats(4)),
    "written": (Written, _floats(4)),
    "places": (lambda: Pooled(Places(), 4, dim=2), _floats(*_sequence)),
    "windows": (lambda: Pooled(Windows(), 4, dim=2), _floats(*_sequence)),
    "checkpointed": (Checkpointed, _floats(5)),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
        _floats(4),
    ),
    "weight standardised": (
        lambda: Pooled(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 3), dim=None), 3),
        _floats(*_image),
    ),
    "tied by transposition": (
        lambda: _tied_by_transposition(),
        _floats(4),
    ),
}

# Networks in which some parameter has no rule.
UNRULED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "exponent": (Exponent, _floats(5)),
    "held exponent": (HeldExponent, _floats(5)),
    "packed": (Packed, lambda: (_floats(*_sequence)(), torch.randint(1, 7, (SAMPLES,)))),
    "max embedding bag": (lambda: Pooled(nn.EmbeddingBag(6, 4, mode="max"), 4), _tokens(5)),
}


def _tied_by_transposition() -> nn.Module:
    encoder = nn.Linear(4, 3)
    return nn.Sequential(
        encoder, nn.Tanh(), Apply(lambda x: F.linear(x, encoder.weight.t())), nn.Tanh(), encoder
    )
