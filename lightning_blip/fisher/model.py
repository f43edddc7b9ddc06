"""A module together with a likelihood: the log-probabilities of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_blip.fisher.likelihood import Draws, Likelihood
from lightning_blip.fisher.samples import Batch, call_arguments


@dataclass(frozen=True)
class Model:
    """A module and the likelihood of its output.

    Attributes:
        module: In evaluation mode.
        likelihood: Gives p(y | x) from the module's output.
        sampled: Whether labels are drawn from p(y | x); otherwise they are the targets.
    """

    module: nn.Module
    likelihood: Likelihood
    sampled: bool

    def label(self, batch: Batch, draws: Draws) -> tuple[Batch, Tensor]:
        """Return ``batch`` with labels in place of its targets, and each sample's log-probability.

        Raises:
            FloatingPointError: If a log-probability is not finite.
        """
        args, kwargs = call_arguments(batch.inputs)
        output = self.module(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # labels depend on no parameter, so nothing is to be recorded
            if self.sampled:
                labels = self.likelihood.draw(output, batch.labels, draws)
            else:
                labels = self.likelihood.from_targets(output, batch.labels)
        labelled = replace(batch, labels=labels)
        log_prob = self._of_output(output, labelled)
        if not log_prob.isfinite().all():
            raise FloatingPointError(
                f"A log-probability in batch {batch.index} is not finite: look for NaN or infinite values in "
                "its inputs, its targets and the module's parameters"
            )
        return labelled, log_prob

    def log_prob(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the log-probability of each sample's labels.

        Args:
            batch: Samples with labels.
            parameters: Values that replace the module's parameters, by name; default, none.
        """
        args, kwargs = call_arguments(batch.inputs)
        if parameters is None:
            return self._of_output(self.module(*args, **kwargs), batch)
        return self._of_output(functional_call(self.module, dict(parameters), args, kwargs), batch)

    def _of_output(self, output: Any, batch: Batch) -> Tensor:
        log_prob = self.likelihood.log_prob(output, batch.labels)
        if log_prob.shape[:1] != (batch.size,):
            raise ValueError(
                f"The module's output for {batch.size} samples gives log-probabilities of shape "
                f"{tuple(log_prob.shape)}: the first dimension of inputs and output must be the batch"
            )
        return log_prob.flatten(1).sum(1) if log_prob.ndim > 1 else log_prob
