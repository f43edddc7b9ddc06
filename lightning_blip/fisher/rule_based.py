"""Squared gradients of the parameters that rules serve, all from one backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_blip.fisher.gradients import Observer, Pulled, SampleGradients, add, at_least_single
from lightning_blip.fisher.layout import ALONE, Layout
from lightning_blip.fisher.recorder import Call, Key, Recorder, Use, backward


@dataclass
class Ruled:
    """The ``parameters`` that rules serve, by name, and for each kind of call where it has its samples."""

    parameters: dict[str, nn.Parameter]
    layouts: Mapping[Key, Layout]

    def covers(self, recorder: Recorder, count: int) -> bool:
        """Whether these calls on ``count`` samples are such that the rules' gradients are complete."""
        if recorder.unruled & self.parameters.keys():
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
        """Adds the squared gradients of each sample's part of ``total`` to ``sums``, by parameter name."""
        several: defaultdict[str, list[SampleGradients]] = defaultdict(list)
        uses: defaultdict[Call, list[tuple[Use, str]]] = defaultdict(list)
        alone = self._used_once_and_directly(recorder)
        for call, use, name in self._uses(recorder):
            uses[call].append((use, name))

        def finish(name: str, gradients: SampleGradients) -> None:
            gradients.add_squares(sums[name])
            for observer in observers:
                observer.see(name, gradients)

        def receive(call: Call, grad: Tensor) -> None:
            for use, name in uses.pop(call):
                gradients = self.gradients(call, use, name, grad, count)
                if name in alone:
                    finish(name, gradients)
                else:
                    several[name].append(gradients)

        for call in uses:
            call.receive = partial(receive, call)
        backward(total, recorder.calls)
        with torch.no_grad():  # inputs of later layers have a graph, which sums must not keep
            for name in list(several):
                finish(name, add(several.pop(name)))

    def gradients(self, call: Call, use: Use, name: str, grad: Tensor, count: int) -> SampleGradients:
        """What one use of a parameter adds to its gradients, from the gradient of the call's output."""
        layout = ALONE if count == 1 else self.layouts[call.key]
        gradients = use.gradients(at_least_single(grad), partial(layout.first, count=count))
        parameter = self.parameters[name]
        return gradients if use.tensor is parameter else Pulled(gradients, use.tensor, parameter)

    def uses_of(self, recorder: Recorder, name: str) -> list[tuple[Call, Use]]:
        """Where a parameter was used, in the order of the calls."""
        return [(call, use) for call, use, used in self._uses(recorder) if used == name]

    def _uses(self, recorder: Recorder) -> Iterator[tuple[Call, Use, str]]:
        for call in recorder.calls:
            for use in call.uses:
                for name in sorted(use.names & self.parameters.keys()):
                    yield call, use, name

    def _used_once_and_directly(self, recorder: Recorder) -> set[str]:
        """Parameters whose squares can be added, and their gradients freed, within the backward pass."""
        uses: defaultdict[str, list[Use]] = defaultdict(list)
        for _, use, name in self._uses(recorder):
            uses[name].append(use)
        return {
            name
            for name, (use, *others) in uses.items()
            if not others and use.tensor is self.parameters[name]
        }
