"""Squared per-sample gradients of any parameter: vectorised over samples, or one sample at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_blip.fisher.gradients import BUDGET_BYTES, at_least_single
from lightning_blip.fisher.model import Model
from lightning_blip.fisher.recorder import backward
from lightning_blip.fisher.rounding import agree
from lightning_blip.fisher.samples import Batch, map_tensors, tensors_in


@dataclass
class Fallback:
    """Squared gradients of the parameters without a rule.

    Attributes:
        model: The module and its likelihood.
        parameters: The parameters without a rule, by name.
        vectorised: Whether ``torch.func`` is used; it is set to False where this does not work.
        sample_bytes: The memory that the graph of one sample's forward pass keeps.
    """

    model: Model
    parameters: dict[str, nn.Parameter]
    vectorised: bool = True
    sample_bytes: int = 0

    def choose(self, sample: Batch) -> None:
        """Turn vectorisation off unless it gives the same gradients of one ``sample`` as autograd."""
        if not self.parameters:
            return
        found = self.squares(sample)
        with _counting_kept_bytes() as kept:
            true = self._looped_squares(sample)
        self.sample_bytes = sum(kept)
        largest = max(float(square.sqrt().norm()) for square in true.values())
        for name, square in true.items():
            if not agree(found[name].sqrt(), square.sqrt(), largest):
                self.vectorised = False

    def add_squares(self, batch: Batch, sums: Mapping[str, Tensor]) -> None:
        """Add the squared gradients of the samples of ``batch`` to ``sums``, by parameter name."""
        if not self.parameters:
            return
        gradients = sum(p.numel() * p.element_size() for p in self.parameters.values())
        step = max(1, BUDGET_BYTES // (2 * (gradients + self.sample_bytes)))
        for start in range(0, batch.size, step):
            for name, square in self.squares(batch[start : start + step]).items():
                sums[name] += square

    def squares(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sums of squares over the samples of ``batch``, all of them at once where possible."""
        if self.vectorised:
            try:
                return self._vectorised_squares(batch)
            except Exception:  # any error: the module may still work on one sample
                self.vectorised = False
        return self._looped_squares(batch)

    def _vectorised_squares(self, batch: Batch) -> dict[str, Tensor]:
        tensors = tensors_in((batch.inputs, batch.labels))
        per_sample = [batch.is_per_sample(tensor) for tensor in tensors]

        def log_prob(parameters: dict[str, Tensor], values: list[Tensor]) -> Tensor:
            single = (value[None] if own else value for value, own in zip(values, per_sample, strict=True))
            inputs, labels = map_tensors(lambda _: next(single), (batch.inputs, batch.labels))
            return self.model.log_prob(Batch(inputs, labels, 1, batch.index), parameters).squeeze(0)

        gradients = vmap(grad(log_prob), in_dims=(None, [0 if own else None for own in per_sample]))
        # torch.func needs no graph of autograd around it. vmap supports only the MATH kernel of attention.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            grads = gradients({name: p.detach() for name, p in self.parameters.items()}, tensors)
            return {name: at_least_single(g).square().sum(0) for name, g in grads.items()}

    def _looped_squares(self, batch: Batch) -> dict[str, Tensor]:
        squares = {name: torch.zeros_like(at_least_single(p.detach())) for name, p in self.parameters.items()}
        for sample in (batch[i : i + 1] for i in range(batch.size)):
            with naming(self.parameters):
                grads = backward(self.model.log_prob(sample).sum(), [], list(self.parameters.values()))
            for square, gradient in zip(squares.values(), grads, strict=True):
                if gradient is not None:
                    square += at_least_single(gradient).square()
        return squares


@contextmanager
def _counting_kept_bytes() -> Iterator[list[int]]:
    """Collect the sizes of all tensors that graphs recorded in this context keep for the backward pass."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@contextmanager
def naming(parameters: Iterable[str]) -> Iterator[None]:
    """Name the ``parameters`` in an error that occurs while their gradients are computed."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"The per-sample gradients of {', '.join(parameters)} cannot be computed: {error!r}; "
            "leave these parameters out with parameters=[...]"
        ) from error
