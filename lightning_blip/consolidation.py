"""One boundary: measure a task's information, choose strengths, freeze bits, and report."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_blip.boundary import BoundaryReport, LayerReport, counts_by_layer, layer_of
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.overlap import OverlapObserver
from lightning_blip.frozen.base import TaskInformation
from lightning_blip.frozen.network import BASES, Collectors, FrozenNetwork
from lightning_blip.settings import Settings
from lightning_blip.strengths import (
    KRONECKER_DAMPING,
    KRONECKER_PULL,
    Measured,
    choose_damping,
    choose_prior,
    choose_pull,
)
from lightning_blip.trainer import processes
from lightning_blip.trainer.task_batches import TaskBatches

# Where there is too little memory, each batch is divided into this number of parts.
_PARTS = 4


@dataclass
class Consolidation:
    """What all boundaries of one BLIP work on.

    Attributes:
        settings: The arguments of BLIP.
        network: What is frozen.
        chosen: The prior, pull and damping in use; the first boundary adds those that are missing.
        quiet: Whether to show no progress bar.
    """

    settings: Settings
    network: FrozenNetwork
    chosen: MutableMapping[str, float]
    quiet: bool = False

    @torch.no_grad()
    def __call__(self, module: nn.Module, batches: TaskBatches, task: int) -> BoundaryReport:
        """Cross one boundary; an error before the bits are frozen leaves what is frozen as it was.

        Args:
            module: The network, trained on the task.
            batches: The task's training data.
            task: The number of tasks consolidated before, the seed of the sampled labels.

        Returns:
            What was measured and frozen.
        """
        start, network = time.perf_counter(), self.network
        strain, drifted, before = network.strain(module), network.drifted(module), network.bits()
        network.settle(module, self.chosen.get("pull", 0.0))
        fishers, collectors, overlaps = self._measure(module, batches, task)
        self._average(fishers, collectors)
        information = collectors.information(fishers)
        # A task without information, such as one with a single class, is no basis for a choice.
        if any(fisher.any() for fisher in fishers.values()):
            self._choose_strengths(fishers, overlaps)
            information = {name: one.damped(self.chosen["damping"]) for name, one in information.items()}
            self._choose_prior(module, information)
        gains = network.consolidate(module, information)
        after = network.bits()
        newly_frozen = sum(_newly_frozen(before[name], bits) for name, bits in after.items())
        return BoundaryReport(
            predicted_forgetting=strain.forgetting,
            used_capacity=network.used_capacity,
            at_wall_share=strain.at_walls / network.values,
            newly_frozen_share=newly_frozen / network.values,
            drifted_share=drifted / network.values,
            strengths=dict(self.chosen),
            seconds=time.perf_counter() - start,
            layers=_layer_reports(module, gains, after, self.settings.max_bits),
        )

    def _measure(
        self, module: nn.Module, batches: TaskBatches, task: int
    ) -> tuple[dict[str, Tensor], Collectors, OverlapObserver]:
        """Estimate the Fisher information; once more with smaller batches where memory does not suffice."""
        try:
            return self._estimate(module, batches, task, parts=1)
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or is_oom_error(error)):
                raise
            garbage_collection_cuda()
            rank_zero_warn(
                f"Not enough memory to measure the information: trying again with {_PARTS} parts per batch"
            )
            return self._estimate(module, batches, task, _PARTS)

    def _estimate(
        self, module: nn.Module, batches: TaskBatches, task: int, parts: int
    ) -> tuple[dict[str, Tensor], Collectors, OverlapObserver]:
        """Return this process's Fisher information by parameter name, and what the observers have seen."""
        own, settings = dict(module.named_parameters()), self.settings
        collectors = self.network.observe(module)
        names = [one for name in collectors.collectors for one in collectors.names[name]]
        overlaps = OverlapObserver(max((own[name].numel() for name in names), default=1))
        if not names:  # no tracked parameter is trained any more: what is frozen stays
            return {}, collectors, overlaps
        rank, count = processes.rank_and_world_size()
        samples = math.ceil(settings.samples / count)
        # In a log file a bar would be noise.
        visible = not self.quiet and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        with tqdm(
            desc="Fisher information", total=min(samples, batches.samples or samples), unit=" samples",
            delay=1.0, leave=False, disable=not visible,
        ) as bar:  # fmt: skip
            fishers = diagonal_fisher(
                module,
                batches,
                likelihood=settings.likelihood,
                labels=settings.labels,
                samples=samples,
                smoothing=settings.smoothing,
                generator=torch.Generator().manual_seed(task),
                parameters=names,
                observers=[collectors, overlaps] if self._measures_overlaps else [collectors],
                shard=(rank, count),
                parts=parts,
                progress=bar.update,
            )
        return fishers, collectors, overlaps

    def _average(self, fishers: Mapping[str, Tensor], collectors: Collectors) -> None:
        """Average the estimates of all processes, in place.

        Raises:
            FloatingPointError: If a value is not finite.
        """
        for name, fisher in fishers.items():
            if not processes.average(fisher).isfinite().all():
                raise FloatingPointError(
                    f"The Fisher information of {name!r} is not finite, although the loss is: look for "
                    "gradients that overflow, such as the gradient of a square root at 0"
                )
        if fishers:
            for mean in collectors.finish():
                processes.average(mean)

    @property
    def _measures_overlaps(self) -> bool:
        """Whether pull or damping have to be chosen from how far the Fisher information is from diagonal."""
        is_chosen = {"pull", "damping"} <= self.chosen.keys()
        return BASES[self.settings.basis].ignores_correlations and not is_chosen

    def _choose_strengths(self, fishers: Mapping[str, Tensor], overlaps: OverlapObserver) -> None:
        """Choose the pull and the damping, where they are not given."""
        if {"pull", "damping"} <= self.chosen.keys():
            return
        seen = [fishers[name] for name in sorted(overlaps.names)]
        trace = float(sum(fisher.sum() for fisher in seen))
        norms = [norm for norm in processes.gathered(overlaps.squared_norm()) if norm is not None]
        norm = sum(norms) / max(len(norms), 1)
        pull, damping = KRONECKER_PULL, KRONECKER_DAMPING
        if self._measures_overlaps and norm and trace:
            pull = choose_pull(norm, float(sum(fisher.double().square().sum() for fisher in seen)))
            damping = choose_damping(norm, trace)
        self.chosen.setdefault("pull", pull)
        self.chosen.setdefault("damping", damping)

    def _choose_prior(self, module: nn.Module, information: Mapping[str, TaskInformation]) -> None:
        """Choose the prior, where it is not given, and set S_0 of every state without information."""
        if "prior" not in self.chosen:
            units, settings = self.network.units(module), self.settings
            measured = [
                Measured(one.coordinates(), float(units[name]), self.network.states[name].bound)
                for name, one in information.items()
            ]
            self.chosen["prior"] = choose_prior(
                measured, settings.max_bits, settings.expected_tasks, settings.forgetting_budget
            )
        self.network.set_prior(module, self.chosen["prior"])


def _layer_reports(
    module: nn.Module, gains: Mapping[str, Tensor], bits: Mapping[str, Tensor], max_bits: int
) -> dict[str, LayerReport]:
    """Return a report per layer, in the network's order."""
    ordered = {name: bits[name] for name, _ in module.named_parameters() if name in bits}
    gained: dict[str, float] = {}
    for name in ordered:
        gain = float(gains[name].sum()) if name in gains else 0.0
        gained[layer_of(name)] = gained.get(layer_of(name), 0.0) + gain
    return {
        layer: LayerReport(gained[layer], counts)
        for layer, counts in counts_by_layer(ordered, max_bits).items()
    }


def _newly_frozen(before: Tensor, after: Tensor) -> int:
    """Return the number of values, or coordinates by eigenvalue, with more frozen bits than before."""
    known = torch.zeros_like(after)
    known[tuple(slice(size) for size in before.shape)] = before
    return int((after > known).sum())
