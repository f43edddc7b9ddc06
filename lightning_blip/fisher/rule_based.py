"""Squared gradients of all parameters with a rule, from one backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_blip.fisher.gradients import (
    ChainRule,
    Observer,
    SampleGradients,
    at_least_single,
    sum_of_uses,
)
from lightning_blip.fisher.layout import SINGLE_SAMPLE, Layout
from lightning_blip.fisher.recorder import Call, Key, Recorder, Use, backward


@dataclass
class RuleBased:
    """Per-sample gradients by rules.

    Attributes:
        parameters: The parameters with a rule, by name.
        layouts: Where the samples are in the output of each call.
    """

    parameters: dict[str, nn.Parameter]
    layouts: Mapping[Key, Layout]

    def covers(self, recorder: Recorder, count: int) -> bool:
        """Return whether the rules give complete gradients for these calls on ``count`` samples."""
        if recorder.without_rule & self.parameters.keys():
            return False
        return count == 1 or all(
            call.key in self.layouts and self.layouts[call.key].fits(call.shape, count)
            for call, _, _ in self._uses(recorder)
        )

    def add_squares(
        self,
        total: Tensor,
        recorder: Recorder,
        count: int,
        sums: Mapping[str, Tensor],
        observers: Sequence[Observer] = (),
    ) -> None:
        """Run the backward pass of ``total`` and add the squares of its per-sample gradients to ``sums``.

        Args:
            total: The sum of the samples' log-probabilities.
            recorder: The calls of its forward pass.
            count: The number of samples.
            sums: The sums of squares, by parameter name.
            observers: They receive the gradients too.
        """
        parts: defaultdict[str, list[SampleGradients]] = defaultdict(list)
        uses: defaultdict[Call, list[tuple[Use, str]]] = defaultdict(list)
        used_once = self._used_once_and_directly(recorder)
        for call, use, name in self._uses(recorder):
            uses[call].append((use, name))

        def finish(name: str, gradients: SampleGradients) -> None:
            gradients.add_squares(sums[name])
            for observer in observers:
                observer.see(name, gradients)

        def receive(call: Call, grad: Tensor) -> None:
            for use, name in uses.pop(call):
                gradients = self.gradients(call, use, name, grad, count)
                if name in used_once:
                    finish(name, gradients)
                else:
                    parts[name].append(gradients)

        for call in uses:
            call.on_gradient = partial(receive, call)
        backward(total, recorder.calls)
        with torch.no_grad():  # inputs of later layers have a graph, which the sums must not keep
            for name in list(parts):
                finish(name, sum_of_uses(parts.pop(name)))

    def gradients(self, call: Call, use: Use, name: str, grad: Tensor, count: int) -> SampleGradients:
        """Return the gradients of one use of a parameter, from the gradient ``grad`` of the call's output."""
        layout = SINGLE_SAMPLE if count == 1 else self.layouts[call.key]
        gradients = use.gradients(at_least_single(grad), partial(layout.samples_first, count=count))
        parameter = self.parameters[name]
        return gradients if use.tensor is parameter else ChainRule(gradients, use.tensor, parameter)

    def uses_of(self, recorder: Recorder, name: str) -> list[tuple[Call, Use]]:
        """Return the uses of a parameter, in the order of the calls."""
        return [(call, use) for call, use, used in self._uses(recorder) if used == name]

    def _uses(self, recorder: Recorder) -> Iterator[tuple[Call, Use, str]]:
        for call in recorder.calls:
            for use in call.uses:
                for name in sorted(use.names & self.parameters.keys()):
                    yield call, use, name

    def _used_once_and_directly(self, recorder: Recorder) -> set[str]:
        """Return the parameters whose squares can be added, and gradients freed, during the backward pass."""
        uses: defaultdict[str, list[Use]] = defaultdict(list)
        for _, use, name in self._uses(recorder):
            uses[name].append(use)
        return {
            name
            for name, (use, *others) in uses.items()
            if not others and use.tensor is self.parameters[name]
        }
