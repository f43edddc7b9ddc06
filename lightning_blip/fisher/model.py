"""A module together with a likelihood: the log-probabilities of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_blip.fisher.batches import Batch, arguments
from lightning_blip.fisher.likelihood import Draws, Likelihood


@dataclass(frozen=True)
class Model:
    """A module whose output ``likelihood`` reads; labels are ``sampled`` or the data's targets."""

    module: nn.Module
    likelihood: Likelihood
    sampled: bool

    def label(self, batch: Batch, draws: Draws) -> tuple[Batch, Tensor]:
        """``batch`` labelled, in place of the data's targets, and the log-probability of each sample."""
        args, kwargs = arguments(batch.inputs)
        output = self.module(*args, **kwargs)
        choose = self.likelihood.draw if self.sampled else self.likelihood.check
        with torch._C.DisableTorchFunction():  # labels depend on no parameter: who watches need not look
            labelled = replace(batch, labels=choose(output, batch.labels, draws))
        log_prob = self._of_output(output, labelled)
        if not log_prob.isfinite().all():
            raise FloatingPointError(
                f"A log-probability in batch {batch.index} is not finite: look for NaN or infinite values in "
                "its inputs, its targets and the module's parameters."
            )
        return labelled, log_prob

    def log_prob(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The log-probability of each sample's labels, with ``parameters`` in place of the module's own."""
        args, kwargs = arguments(batch.inputs)
        if parameters is None:
            return self._of_output(self.module(*args, **kwargs), batch)
        return self._of_output(functional_call(self.module, dict(parameters), args, kwargs), batch)

    def _of_output(self, output: Any, batch: Batch) -> Tensor:
        log_prob = self.likelihood.log_prob(output, batch.labels)
        if log_prob.shape[:1] != (batch.size,):
            raise ValueError(
                f"The module's output for {batch.size} samples gives log-probabilities of shape "
                f"{tuple(log_prob.shape)}: the first dimension of inputs and output must be the batch."
            )
        return log_prob.flatten(1).sum(1) if log_prob.ndim > 1 else log_prob
