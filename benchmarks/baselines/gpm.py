"""Gradient Projection Memory: what layers make of the directions that old inputs lie in stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baselines.parameters import tracked
from lightning_blip import Task
from lightning_blip.fisher.factors import matrix_layers
from lightning_blip.fisher.isolation import left_as_before
from lightning_blip.fisher.samples import read_batches
from lightning_blip.tasks.boundaries import sequence

Layer = nn.Linear | nn.Conv2d

# Directions that hold a smaller share of the squared norm are rounding errors.
_ROUNDING = 1e-12


class GPM(pl.Callback):
    """Gradient Projection Memory: each layer's gradient G is replaced by G − (G·M)·Mᵀ before each step.

    The columns of M are an orthonormal basis of the directions in which the inputs of the layer, those of
    samples of all tasks before, mostly lie; so what the layer makes of them hardly changes. After each task
    come as many of the leading singular vectors of what M leaves of the task's inputs as are needed to keep a
    share of their squared norm, where what M holds already counts. Of a convolution, an input is a patch.

    The layers are all linear maps and ungrouped two-dimensional convolutions outside ``TaskHeads``, a shared
    head included; all other parameters, as those of norms, learn as they would without it. The authors'
    networks have no biases: here a bias is the weight of one more input that is always 1. What is projected
    is the gradient: momentum and plain SGD, by which the authors train, keep to its directions, optimizers
    that scale each parameter by itself, as Adam does, do not.

    Args:
        threshold: The share of the squared norm that is kept.
        first_threshold: The same for the first layer, whose inputs are the data's.
        samples: How many training samples of a task are used.

    Raises:
        ValueError: If a threshold is no share.

    Source:
        Saha, Garg and Roy, Gradient Projection Memory for Continual Learning, ICLR 2021, sections 4 and 5;
        the defaults are their settings for permuted MNIST.
    """

    def __init__(self, threshold: float = 0.99, first_threshold: float = 0.95, samples: int = 300) -> None:
        for name, share in (("threshold", threshold), ("first_threshold", first_threshold)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must be a share of the squared norm, 0 to 1")
        self.threshold = threshold
        self.first_threshold = first_threshold
        self.samples = samples
        self._memory: dict[str, Tensor] = {}
        self._layers: dict[str, Layer] = {}
        self._old: dict[str, Tensor] = {}  # (G·M)·Mᵀ, of linear maps
        self._watches = ExitStack()

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Finds the layers, and watches the linear maps among them."""
        self._layers = _layers(pl_module)
        self._memory = {name: M.to(self._layers[name].weight.device) for name, M in self._memory.items()}
        for name in self._memory:
            layer = self._layers[name]
            if isinstance(layer, nn.Linear):
                self._watches.enter_context(layer.register_forward_hook(partial(self._watch, name)))

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes out of each gradient what would change old outputs."""
        for name, M in self._memory.items():
            gradients = [cast(Tensor, theta.grad) for theta in self._layers[name].parameters()]
            parts = [gradient.reshape(len(gradient), -1) for gradient in gradients]
            old = self._old.pop(name) if name in self._old else torch.cat(parts, 1) @ M @ M.T
            olds = old.split([part.shape[1] for part in parts], 1)
            for gradient, part in zip(gradients, olds, strict=True):
                gradient -= part.reshape_as(gradient)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Takes in the directions of the task that was just learned."""
        self._watches.close()
        batches = sequence(trainer).task_dataloader()
        inputs = layer_inputs(pl_module, self._layers, batches, self.samples)
        for index, (name, R) in enumerate(inputs.items()):
            M = self._memory.get(name, R.new_zeros(len(R), 0)).to(R.dtype)
            grown = grow_basis(M, R, self.threshold if index else self.first_threshold)
            self._memory[name] = grown.to(self._layers[name].weight.dtype)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watches no longer."""
        self._watches.close()

    def state_dict(self) -> dict[str, Any]:
        """What was learned: goes into every checkpoint."""
        return {"memory": self._memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what was saved."""
        self._memory = state_dict["memory"]

    def _watch(self, name: str, layer: nn.Linear, args: tuple[Tensor, ...], y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(partial(self._note, name, _rows(layer, args[0].detach())))

    def _note(self, name: str, X: Tensor, dY: Tensor) -> None:
        """As G is dYᵀ·X, and a batch has fewer samples than a layer outputs: to project X takes less."""
        M = self._memory[name]
        old = dY.flatten(0, -2).T @ (X @ M @ M.T)
        self._old[name] = self._old[name] + old if name in self._old else old


def layer_inputs(
    module: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Any], samples: int
) -> dict[str, Tensor]:
    """The inputs of layers in evaluation mode, as columns; the module is left as it was.

    Args:
        module: That is run.
        layers: Those of its layers that are asked for, by name.
        batches: Yields pairs ``(inputs, targets)``, the inputs a tensor.
        samples: How many to use at most.

    Returns:
        By name, in float64, a matrix with a row for each input, the last one that of the bias. Its columns
        are at most as many as its rows, but R·Rᵀ, so singular values and left vectors, is that of all inputs.
    """
    triangles: dict[str, Tensor] = {}
    device = next(module.parameters()).device

    def see(name: str, layer: Layer, x: Tensor) -> None:
        rows = _rows(layer, x).double()
        seen = triangles.get(name, rows[:0])
        # Of a convolution there are far too many patches to keep them all.
        triangles[name] = torch.linalg.qr(torch.cat([seen, rows]), mode="r").R

    with ExitStack() as stack:
        for name, layer in layers.items():
            watch = layer.register_forward_pre_hook(lambda layer, args, name=name: see(name, layer, args[0]))
            stack.enter_context(watch)
        stack.enter_context(left_as_before(module, device, ()))
        stack.enter_context(torch.no_grad())
        for batch in read_batches(batches, samples, device):
            module(batch.inputs)
    return {name: triangles[name].T for name in layers if name in triangles}


def grow_basis(M: Tensor, R: Tensor, threshold: float) -> Tensor:
    """Adds to a basis what it takes to hold a share of the squared norm of some vectors.

    Args:
        M: An orthonormal basis, (in, k).
        R: The vectors, (in, n).
        threshold: The share.

    Returns:
        M with as few more columns as possible, the leading left singular vectors of R − M·Mᵀ·R.

    Example:
        >>> grow_basis(torch.zeros(2, 0), torch.tensor([[3.0, 3.0], [0.0, 1.0]]), threshold=0.9).shape
        torch.Size([2, 1])
    """
    rest = R - M @ (M.T @ R)
    U, S, _ = torch.linalg.svd(rest, full_matrices=False)
    total = R.square().sum()
    held = torch.cat([(total - rest.square().sum())[None], S.square()]).cumsum(0)
    more = int((held < (threshold - _ROUNDING) * total).sum())
    return torch.cat([M, U[:, :more]], 1)


def _layers(module: nn.Module) -> dict[str, Layer]:
    """The layers whose weights are matrices, by name, in their order."""
    names = [weight.rpartition(".")[0] for weight in matrix_layers(module, tracked(module))]
    layers = ((name, module.get_submodule(name)) for name in names)
    return {name: layer for name, layer in layers if isinstance(layer, Layer)}


def _rows(layer: Layer, x: Tensor) -> Tensor:
    """What a layer's weight matrix is multiplied with, a row each: vectors or patches, then the bias's 1."""
    if isinstance(layer, nn.Conv2d):
        sizes = (layer.kernel_size, layer.dilation, cast(Any, layer.padding), layer.stride)
        x = F.unfold(x, *sizes).mT
    rows = x.flatten(0, -2)
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)
