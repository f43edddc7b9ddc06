"""Common architectures, small enough for one backward pass per sample."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import alexnet, resnet18

Inputs = Tensor | dict[str, Tensor]
Ready = tuple[nn.Module, Inputs, Tensor]

SAMPLES = 5


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.bottom = self._convs(3, 8), self._convs(8, 12), self._convs(12, 16)
        self.raise_bottom, self.raise_down = nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)
        self.up, self.leave = self._convs(24, 12), self._convs(16, 8)
        self.last = nn.Conv2d(8, 3, 1)

    @staticmethod
    def _convs(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU(True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        high = self.enter(x)
        middle = self.down(F.max_pool2d(high, 2))
        low = self.bottom(F.max_pool2d(middle, 2))
        middle = self.up(torch.cat([middle, self.raise_bottom(low)], 1))
        return self.last(self.leave(torch.cat([high, self.raise_down(middle)], 1)))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.rnn = nn.GRU(6, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.last = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(self.embedding(x))[0])


class SequenceFirstClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(4, 8, proj_size=5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x.transpose(0, 1))[0][-1])


class TiedLanguageModel(nn.Module):
    """Uses its embedding as the output layer too, and one hidden layer at every depth."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.hidden = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for _ in range(3):
            x = x + self.hidden(self.norm(x)).tanh().cumsum(1)
        return F.linear(x, self.embedding.weight).transpose(1, 2)


class CrossAttention(nn.Module):
    """Applies attention among queries, then from queries to an encoded context."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.to_itself = nn.MultiheadAttention(8, 2, batch_first=True)
        self.to_context = nn.MultiheadAttention(8, 2, kdim=8, vdim=8, batch_first=True)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        context = self.encoder(context)
        x = self.norm(queries + self.to_itself(queries, queries, queries)[0])
        x = x + self.to_context(x, context, context, need_weights=False)[0]
        return self.last(x.mean(1))


def _ready(network: nn.Module, inputs: Inputs, targets: Tensor) -> Ready:
    """Return the network in float64 and evaluation mode, weights and statistics as if trained."""
    if isinstance(inputs, dict):
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    elif inputs.is_floating_point():
        inputs = inputs.double()
    network = network.double().train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        network(**inputs) if isinstance(inputs, dict) else network(inputs)
    return network.eval(), inputs, targets


def _images(size: int) -> Tensor:
    return torch.randn(SAMPLES, 3, size, size)


def _classes(*positions: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (SAMPLES, *positions))


def _padded(vocabulary: int = 31, length: int = 7) -> dict[str, Tensor]:
    """Return token ids, in which 0 is the padding."""
    lengths = torch.randint(3, length, (SAMPLES, 1))
    mask = torch.arange(length) < lengths
    return {
        "input_ids": torch.randint(1, vocabulary, (SAMPLES, length)) * mask,
        "attention_mask": mask.long(),
    }


def _alexnet() -> Ready:
    return _ready(nn.Sequential(alexnet(1 / 16), nn.Linear(128, 3)), _images(32), _classes())


def _resnet18() -> Ready:
    return _ready(resnet18(width=8, classes=3), _images(16), _classes())


def _vit() -> Ready:
    # timm imports torchvision, mostly to read images. It is not installed, because a torchvision built for
    # another torch breaks torchmetrics. The stand-in is removed afterwards, so that torchmetrics does not
    # find it.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional"):
            patch.setitem(sys.modules, f"torchvision{name}", MagicMock())
        timm = pytest.importorskip("timm.models.vision_transformer")
    network = timm.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3, init_values=0.1
    )
    return _ready(network, _images(16), _classes())


def _bert_config(transformers: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        num_labels=3,
    )


def _bert() -> Ready:
    transformers = pytest.importorskip("transformers")
    network = transformers.BertForSequenceClassification(_bert_config(transformers))
    return _ready(network, _padded(), _classes())


def _bert_tagger() -> Ready:
    transformers = pytest.importorskip("transformers")
    network = transformers.BertForMaskedLM(_bert_config(transformers))
    inputs = _padded()
    seen = inputs["attention_mask"].bool() & (torch.rand(inputs["input_ids"].shape) < 0.7)
    return _ready(network, inputs, torch.where(seen, _classes(7, classes=31), -100))


def _gpt2() -> Ready:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=31,
        n_positions=8,
        n_embd=16,
        n_layer=2,
        n_head=2,
        num_labels=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _ready(transformers.GPT2ForSequenceClassification(config), _padded(), _classes())


def _lora() -> Ready:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        transformers.BertForSequenceClassification(_bert_config(transformers)),
        peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]),
    )
    return _ready(adapted, _padded(), _classes())


def _depthwise_separable() -> Ready:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.PReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.Conv2d(8, 12, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.PReLU(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return _ready(network, _images(16), _classes())


def _cross_attention() -> Ready:
    inputs: Inputs = {"queries": torch.randn(SAMPLES, 4, 8), "context": torch.randn(SAMPLES, 6, 8)}
    return _ready(CrossAttention(), inputs, _classes())


# By name: makes a network in float64 and evaluation mode, its inputs (the batch first) and its targets.
ARCHITECTURES: dict[str, Callable[[], Ready]] = {
    "alexnet": _alexnet,
    "resnet18": _resnet18,
    "vit": _vit,
    "bert": _bert,
    "bert tagger": _bert_tagger,
    "gpt2": _gpt2,
    "lora": _lora,
    "unet": lambda: _ready(UNet(), _images(8), _classes(8, 8)),
    "gru tagger": lambda: _ready(Tagger(), torch.randint(13, (SAMPLES, 7)), _classes(7)),
    "lstm classifier": lambda: _ready(SequenceFirstClassifier(), torch.randn(SAMPLES, 7, 4), _classes()),
    "depthwise separable": _depthwise_separable,
    "tied": lambda: _ready(TiedLanguageModel(), torch.randint(11, (SAMPLES, 7)), _classes(7, classes=11)),
    "cross attention": _cross_attention,
}
