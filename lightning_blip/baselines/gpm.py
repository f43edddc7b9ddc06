"""Gradient Projection Memory: layers keep what they compute for the inputs of earlier tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_blip.baselines.base import Baseline, check_full_precision, task_batches
from lightning_blip.fisher.arguments import check_samples
from lightning_blip.fisher.factors import matrix_layers
from lightning_blip.fisher.isolation import left_as_before
from lightning_blip.fisher.samples import call_arguments, read_batches
from lightning_blip.tasks.heads import shared_parameters
from lightning_blip.tasks.task import Task
from lightning_blip.trainer.task_batches import inputs_and_targets

Layer = nn.Linear | nn.Conv2d

# Directions that hold a smaller share of the squared norm are rounding errors.
_ROUNDING = 1e-12


class GPM(Baseline):
    """Gradient Projection Memory: each layer's gradient G is replaced by G − (G·M)·Mᵀ before each step.

    The columns of M are an orthonormal basis of the space in which most of the layer's inputs in all earlier
    tasks lie, so that the outputs for these inputs hardly change. After each task M gains the leading
    singular vectors of the part of the task's inputs that it does not span, as many as are needed to hold a
    share of their squared norm; the part that M already spans counts towards the share. For a convolution, an
    input is a patch.

    The layers are all linear maps and all ungrouped two-dimensional convolutions with zero padding outside
    ``TaskHeads``, a shared head included, whose weight and bias all train and belong to no other layer. All
    other parameters, such as those of normalisation layers, learn as without GPM. The authors' networks have
    no biases: here a bias is the weight of one more input that is always 1.

    What is projected is the gradient. Steps of SGD, with which the authors train, and of momentum stay in the
    projected directions; weight decay leaves them, and so do optimizers that scale each parameter separately,
    such as Adam (a warning is given). Batches are pairs ``(inputs, targets)`` or mappings whose
    ``"labels"`` are the targets; ``forward`` takes the inputs. The state is M, at most (in, in) per layer; it
    grows with the tasks until M is full.

    Args:
        threshold: The share of the squared norm to hold, 0 to 1.
        first_threshold: The same for the first layer, whose inputs are the data.
        samples: The number of training samples measured per task.

    Raises:
        ValueError: If a threshold is not between 0 and 1, or ``samples`` is below 1. In a fit: if the module
            has no such layer, there are several optimizers or processes, the Trainer is in mixed precision,
            or the inputs of the layers cannot be measured on the first batch.

    Example:
        >>> from lightning_blip import ForgettingCurves
        >>> from lightning_blip.baselines import GPM
        >>> trainer = pl.Trainer(
        ...     callbacks=[GPM(threshold=0.97), ForgettingCurves("val_acc")],
        ...     logger=False,
        ...     enable_checkpointing=False,
        ... )

    Source:
        Saha, Garg and Roy, Gradient Projection Memory for Continual Learning, ICLR 2021, sections 4 and 5;
        the defaults are their settings for permuted MNIST.
    """

    def __init__(self, threshold: float = 0.99, first_threshold: float = 0.95, samples: int = 300) -> None:
        for name, share in (("threshold", threshold), ("first_threshold", first_threshold)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must be a share of the squared norm, 0 to 1")
        check_samples(samples)
        self.threshold = threshold
        self.first_threshold = first_threshold
        self.samples = samples
        self._memory: dict[str, Tensor] = {}
        self._layers: dict[str, Layer] = {}
        self._spanned: dict[str, Tensor] = {}  # (G·M)·Mᵀ of linear maps, from the backward pass
        self._hooks = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the layers of the module and the precision."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_full_precision("GPM", trainer)
        if not _layers(pl_module):
            raise ValueError(
                f"GPM finds no layer in {type(pl_module).__name__} whose gradient it can project, a Linear "
                "or an ungrouped Conv2d outside TaskHeads: take a method for any parameter, as EWC or SI"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of an optimizer whose steps leave the projected directions."""
        super().on_fit_start(trainer, pl_module)
        optimizer = trainer.optimizers[0]
        if not isinstance(optimizer, torch.optim.SGD):
            rank_zero_warn(
                f"GPM projects gradients, and {type(optimizer).__name__} scales the step of each parameter "
                "separately, so that old outputs change more than with SGD, for which GPM was made"
            )

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Find the layers, and observe the linear maps that have a memory."""
        self._layers = _layers(pl_module)
        self._memory = {name: M.to(self._layers[name].weight.device) for name, M in self._memory.items()}
        for name in self._memory:
            layer = self._layers[name]
            if isinstance(layer, nn.Linear):
                self._hooks.enter_context(layer.register_forward_hook(partial(self._observe, name)))

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Subtract from each gradient the part that would change old outputs."""
        for name, M in self._memory.items():
            gradients = [theta.grad for theta in self._layers[name].parameters() if theta.grad is not None]
            if not gradients:  # the layer took no part in the step
                continue
            parts = [gradient.reshape(len(gradient), -1) for gradient in gradients]
            spanned = self._spanned.pop(name) if name in self._spanned else torch.cat(parts, 1) @ M @ M.T
            changes = spanned.split([part.shape[1] for part in parts], 1)
            for gradient, change in zip(gradients, changes, strict=True):
                gradient -= change.reshape_as(gradient)

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Extend each M by directions of the task that just ended."""
        self._hooks.close()
        inputs = layer_inputs(pl_module, self._layers, task_batches(trainer), self.samples)
        for index, (name, R) in enumerate(inputs.items()):
            M = self._memory.get(name, R.new_zeros(len(R), 0)).to(R.dtype)
            grown = grow_basis(M, R, self.threshold if index else self.first_threshold)
            self._memory[name] = grown.to(self._layers[name].weight.dtype)

    def _try_on(self, pl_module: pl.LightningModule, batch: Any) -> None:
        """Measure the inputs of the layers for two samples."""
        layer_inputs(pl_module, self._layers, [inputs_and_targets(batch)], samples=2)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def state_dict(self) -> dict[str, Any]:
        """Return M by layer, for the checkpoint."""
        return {"memory": self._memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore M by layer from a checkpoint."""
        self._memory = state_dict["memory"]

    def _observe(self, name: str, layer: nn.Linear, args: tuple[Tensor, ...], y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(partial(self._add_spanned, name, _rows(layer, args[0].detach())))

    def _add_spanned(self, name: str, X: Tensor, dY: Tensor) -> None:
        """Add dYᵀ·(X·M·Mᵀ), which is (G·M)·Mᵀ: cheaper, as a batch has fewer rows than G."""
        M = self._memory[name]
        spanned = dY.flatten(0, -2).T @ (X @ M @ M.T)
        self._spanned[name] = self._spanned[name] + spanned if name in self._spanned else spanned


def layer_inputs(
    module: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Any], samples: int
) -> dict[str, Tensor]:
    """Return the inputs of layers in evaluation mode, as the columns of one matrix per layer.

    The module's modes, buffers and gradients, and the random numbers, stay as they were.

    Args:
        module: The network, which is run on the batches.
        layers: The layers by name.
        batches: Yields pairs ``(inputs, targets)``.
        samples: The largest number of samples to use.

    Returns:
        R by name, float64, (in, n), with one row per input of the layer, the last one for the bias. n is at
        most the number of rows, and R·Rᵀ is that of all inputs, hence also singular values and left vectors.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> R = layer_inputs(network, {"0": network[0]}, [(torch.eye(2), None)], samples=2)["0"]
        >>> R @ R.T
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    triangles: dict[str, Tensor] = {}
    device = next(module.parameters()).device

    def see(name: str, layer: Layer, x: Tensor) -> None:
        rows = _rows(layer, x).double()
        seen = triangles.get(name, rows[:0])
        # The triangle R of a QR decomposition has the same RᵀR as all rows, which are too many to keep.
        triangles[name] = torch.linalg.qr(torch.cat([seen, rows]), mode="r").R

    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda layer, args, name=name: see(name, layer, args[0]))
            stack.enter_context(hook)
        stack.enter_context(left_as_before(module, device, ()))
        stack.enter_context(torch.no_grad())
        for batch in read_batches(batches, samples, device):
            args, kwargs = call_arguments(batch.inputs)
            module(*args, **kwargs)
    return {name: triangles[name].T for name in layers if name in triangles}


def grow_basis(M: Tensor, R: Tensor, threshold: float) -> Tensor:
    """Extend a basis until it holds a share of the squared norm of some vectors.

    Args:
        M: An orthonormal basis, (in, k).
        R: The vectors, (in, n).
        threshold: The share, 0 to 1.

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
    """Return the layers whose gradients are projected, by name, in the module's order."""
    names = [weight.rpartition(".")[0] for weight in matrix_layers(module, shared_parameters(module))]
    layers = ((name, module.get_submodule(name)) for name in names)
    return {name: layer for name, layer in layers if isinstance(layer, Layer) and _is_projected(layer)}


def _is_projected(layer: Layer) -> bool:
    unfolds = isinstance(layer, nn.Linear) or (
        layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )
    return unfolds and all(theta.requires_grad for theta in layer.parameters())


def _rows(layer: Layer, x: Tensor) -> Tensor:
    """Return what a layer's weight matrix multiplies, one row each: vectors or patches, and the bias's 1."""
    if isinstance(layer, nn.Conv2d):
        sizes = (layer.kernel_size, layer.dilation, cast(Any, layer.padding), layer.stride)
        x = F.unfold(x, *sizes).mT
    rows = x.flatten(0, -2)
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)
