"""Everything that BLIP remembers of the tasks learned: made, consolidated, saved and restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_blip.boundary import BoundaryReport
from lightning_blip.checkpoint import VERSION, upgraded
from lightning_blip.consolidation import Consolidation
from lightning_blip.frozen.checks import check_number
from lightning_blip.frozen.network import FrozenNetwork
from lightning_blip.optim.averaging import MeanWeights
from lightning_blip.settings import Settings
from lightning_blip.tasks.heads import task_heads
from lightning_blip.tasks.norm_stats import NormStats, TaskStatistics, freeze, thaw
from lightning_blip.tracking import tracked_parameters
from lightning_blip.trainer import processes
from lightning_blip.trainer.task_batches import TaskBatches


class Memory:
    """What BLIP remembers: frozen bits, information and anchors, and the running statistics of tasks.

    Args:
        settings: The arguments of BLIP.

    Attributes:
        network: What is frozen.
        chosen: The prior, pull and damping in use, as far as they are known.
        norm_stats: How running statistics are treated; None until the first network is seen.
        statistics: The running statistics of each task.
        mean: The mean of the weights over the end of the current task.
        tasks_learned: The number of tasks consolidated.
        first_task: The index of the current sequence's first task among all tasks learned.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.network = FrozenNetwork(settings.basis, settings.fan, settings.freezing)
        self.chosen = settings.given_strengths
        self.norm_stats: NormStats | None = settings.norm_stats
        self.statistics = TaskStatistics()
        self.mean = MeanWeights()
        self.tasks_learned = 0
        self.first_task = 0

    def tracked(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the parameters of a network whose bits are frozen, by name."""
        return tracked_parameters(module, self.settings.include, self.settings.exclude)

    def attach(self, module: nn.Module) -> None:
        """Make a state for every tracked parameter, and put the current task's statistics in place.

        Raises:
            ValueError: If no parameter is tracked, or the network is not the one that was learned.
        """
        self.network.attach(module, self.tracked(module))
        if not self.network.states:
            raise ValueError(
                "No parameter is tracked, because all trainable ones are inside TaskHeads or left out: "
                "nothing can be forgotten, leave out BLIP"
            )
        if "prior" in self.chosen:
            self.network.set_prior(module, self.chosen["prior"])
        if self.norm_stats is None:
            self.norm_stats = "per_task" if task_heads(module) else "shared"
        self.statistics.back(module)
        self._hold_statistics(module)

    def consolidate(self, module: nn.Module, batches: TaskBatches, quiet: bool = False) -> BoundaryReport:
        """Consolidate one task; after an error nothing is remembered of it.

        Args:
            module: The network, trained on the task.
            batches: The task's training data.
            quiet: Whether to show no progress bar.
        """
        processes.share_buffers(module)
        self.attach(module)
        consolidation = Consolidation(self.settings, self.network, self.chosen, quiet)
        report = consolidation(module, batches, self.tasks_learned)
        if self.norm_stats == "per_task":
            self.statistics.keep(module, self.tasks_learned)
        self.tasks_learned += 1
        self._hold_statistics(module)
        return report

    def use_task(self, module: nn.Module, task: int) -> None:
        """Put the running statistics of a task in place, and make its head active.

        Raises:
            ValueError: If the task is neither learned nor the current one.
        """
        if not 0 <= task <= self.tasks_learned:
            raise ValueError(
                f"task={task} must be 0 to {self.tasks_learned}: one of the {self.tasks_learned} tasks "
                f"learned, or {self.tasks_learned} for the current one"
            )
        for heads in task_heads(module):
            # After the last task there may be no head for a next one.
            if task < len(heads) or task < self.tasks_learned:
                heads.active = task
        self.statistics.back(module)
        self.statistics.show(module, task)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, in plain values and tensors."""
        return {
            "version": VERSION,
            "tasks_learned": self.tasks_learned,
            "settings": self.settings.fixed() | {"norm_stats": self.norm_stats},
            "chosen": self.chosen,
            "frozen": self.network.state_dict(),
            "statistics": self.statistics.state_dict(),
            "first_task": self.first_task,
            "mean": self.mean.state_dict(),
        }

    @classmethod
    def restored(cls, settings: Settings, state_dict: Mapping[str, Any]) -> Memory:
        """Return what was saved.

        Args:
            settings: The arguments of the BLIP that goes on.
            state_dict: What any version of :meth:`state_dict` returned.

        Raises:
            ValueError: If it was learned with other settings, by a later version, or is damaged.
        """
        memory = cls(settings)
        try:
            state = upgraded(state_dict)
            settings.check_resumes(state["settings"])
            memory.network.load_state_dict(state["frozen"])
            memory.statistics.load_state_dict(state["statistics"])
            memory.mean.load_state_dict(state["mean"])
            for name in ("tasks_learned", "first_task"):
                check_number(state, name, 0)
                setattr(memory, name, state[name])
            for name in state["chosen"]:
                check_number(state["chosen"], name, 0)
            memory.chosen = dict(state["chosen"])
            memory.norm_stats = state["settings"]["norm_stats"]
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"What the checkpoint holds of BLIP is damaged, nothing of it was loaded: {error!r}"
            ) from error
        return memory

    def _hold_statistics(self, module: nn.Module) -> None:
        """Freeze or unfreeze normalisation layers as ``norm_stats`` asks, undoing another BLIP's setting."""
        if self.norm_stats == "freeze" and self.tasks_learned:
            freeze(module)
        else:
            thaw(module)
