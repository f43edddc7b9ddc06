"""What a module's output says about the label: log-probabilities of labels, and labels drawn from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent
from typing_extensions import override

IGNORED = -100  # the target of a position that is left out, as in torch.nn.functional.cross_entropy


@contextmanager
def _without_validation() -> Iterator[None]:
    # Checking values looks into the tensors, which cannot be done while samples are vectorised over.
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@dataclass(frozen=True)
class Draws:
    """Random numbers for labels, the same however the samples are divided, into batches or among processes.

    Attributes:
        generator: Of the CPU.
        rank: Of this process, whose samples are every so-many-th from there on.
        processes: How many there are.
    """

    generator: Generator
    rank: int = 0
    processes: int = 1

    def uniform(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Uniform draws in (0, 1)."""
        batch, *rest = shape
        draws = torch.rand(batch * self.processes, *rest, generator=self.generator, dtype=torch.float64)
        # Zero, one draw in 2**53, has no quantile in an unbounded distribution.
        return draws[self.rank :: self.processes].clamp_min_(2.0**-54).to(device)


class Likelihood(ABC):
    """A family of distributions p(y | output)."""

    @abstractmethod
    def log_prob(self, output: Any, labels: Tensor) -> Tensor:
        """The log-probability of ``labels``, per sample and position: shape (batch, ...)."""

    @abstractmethod
    def draw(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        """Labels drawn from p(y | output). ``targets`` give their layout and the positions left out."""

    def check(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        """The data's ``targets`` as labels, if they fit ``output``; nothing is drawn."""
        if not isinstance(targets, Tensor):
            raise ValueError(
                f'labels="empirical" needs a tensor of targets in each batch, not {type(targets).__name__}: '
                'yield (inputs, targets), or ask for labels="sampled".'
            )
        return targets


class CategoricalLogits(Likelihood):
    """One of C classes for each sample, pixel or token; drawn with so much of the uniform mixed in."""

    def __init__(self, smoothing: float = 0.0) -> None:
        self._smoothing = smoothing

    @override
    def log_prob(self, output: Any, labels: Tensor) -> Tensor:
        logits = _logits(output)
        logits = logits.movedim(_class_dim(logits, labels), 1)
        return -F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)

    @override
    def draw(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        logits = _logits(output).detach()
        logits = logits.movedim(_class_dim(logits, targets), -1)
        drawn = _draw_class(logits, draws, self._smoothing)
        if isinstance(targets, Tensor) and targets.shape == drawn.shape:
            drawn = drawn.masked_fill(targets == IGNORED, IGNORED)
        return drawn

    @override
    def check(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        labels = super().check(output, targets, draws)
        logits = _logits(output)
        expected = _without(logits.shape, _class_dim(logits, labels))
        if labels.shape != expected or labels.is_floating_point():
            raise ValueError(
                f"targets must be class indices of shape {tuple(expected)} for an output of shape "
                f"{tuple(logits.shape)}, not {labels.dtype} of shape {tuple(labels.shape)}."
            )
        return labels.long()


class UnitGaussian(Likelihood):
    """A normal distribution of variance 1 around each output."""

    @override
    def log_prob(self, output: Any, labels: Tensor) -> Tensor:
        return (_tensor(output) - labels).square().mul(-0.5)

    @override
    def draw(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        mean = _tensor(output).detach()
        noise: Tensor = torch.special.ndtri(draws.uniform(mean.shape, mean.device))
        return noise.to(mean.dtype).add(mean)

    @override
    def check(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        return _like_output(super().check(output, targets, draws), _tensor(output))


class BernoulliLogits(Likelihood):
    """Yes or no for each output; drawn with so much of the uniform mixed in."""

    def __init__(self, smoothing: float = 0.0) -> None:
        self._smoothing = smoothing

    @override
    def log_prob(self, output: Any, labels: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(_tensor(output), labels, reduction="none")

    @override
    def draw(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        logits = _tensor(output).detach()
        return _draw_yes(logits.double().sigmoid(), draws, self._smoothing).to(logits.dtype)

    @override
    def check(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        return _like_output(super().check(output, targets, draws), _tensor(output))


class FromDistribution(Likelihood):
    """The distribution that a callable makes of the output."""

    def __init__(
        self, distribution: Callable[[Any], Distribution], device: torch.device, smoothing: float
    ) -> None:
        self._distribution = distribution
        self._device = device
        self._smoothing = smoothing

    @override
    @_without_validation()
    def log_prob(self, output: Any, labels: Tensor) -> Tensor:
        distribution = self._distribution(output)
        log_prob: Tensor = distribution.log_prob(labels)
        if log_prob.shape != distribution.batch_shape:
            raise ValueError(
                f"targets of shape {tuple(labels.shape)} do not fit likelihood's distribution, "
                f"whose samples have shape {tuple(distribution.batch_shape + distribution.event_shape)}."
            )
        return log_prob

    @override
    @torch.no_grad()
    @_without_validation()
    def draw(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        distribution = self._distribution(output)
        while isinstance(distribution, Independent):
            distribution = distribution.base_dist
        if isinstance(distribution, Categorical):
            return _draw_class(distribution.logits, draws, self._smoothing)
        if isinstance(distribution, Bernoulli):
            drawn = _draw_yes(distribution.probs.double(), draws, self._smoothing)
            return drawn.to(distribution.probs.dtype)
        return self._draw_by_quantile(distribution, draws)

    def _draw_by_quantile(self, distribution: Distribution, draws: Draws) -> Tensor:
        state = draws.generator.get_state()
        level = draws.uniform(distribution.batch_shape + distribution.event_shape, self._device)
        try:
            dtype = distribution.mean.dtype
            return distribution.icdf(level.to(dtype).clamp_max_(1 - torch.finfo(dtype).eps))
        except NotImplementedError:
            draws.generator.set_state(state)
        seed = int(torch.randint(2**62, (), generator=draws.generator)) + draws.rank
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index].manual_seed(seed)
        return distribution.sample()


_NAMED: dict[str, Callable[[float], Likelihood]] = {
    "categorical": CategoricalLogits,
    "gaussian": lambda _: UnitGaussian(),
    "bernoulli": BernoulliLogits,
}


def find_likelihood(
    likelihood: str | Callable[[Any], Distribution], device: torch.device, smoothing: float
) -> Likelihood:
    """The likelihood of this name, or the one that a callable defines."""
    if isinstance(likelihood, str) and likelihood in _NAMED:
        return _NAMED[likelihood](smoothing)
    if isinstance(likelihood, str) or not callable(likelihood):
        raise ValueError(
            f"likelihood={likelihood!r} is not known: give one of {', '.join(map(repr, _NAMED))}, "
            "or a callable that makes a torch.distributions.Distribution of the module's output."
        )
    return FromDistribution(likelihood, device, smoothing)


def _tensor(output: Any) -> Tensor:
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"The module returned {type(output).__name__}, not a tensor or an object with .logits: "
            "give a callable as likelihood that makes a Distribution of it."
        )
    return output


def _logits(output: Any) -> Tensor:
    logits = _tensor(output)
    if logits.ndim < 2:
        raise ValueError(
            'likelihood="categorical" needs an output of shape (batch, classes, ...), not '
            f'{tuple(logits.shape)}: give likelihood="bernoulli" for one logit a sample.'
        )
    return logits


def _without(shape: torch.Size, dim: int) -> torch.Size:
    return shape[:dim] + shape[dim + 1 :]


def _class_dim(logits: Tensor, targets: Any) -> int:
    """The dimension of the classes: 1, unless only the last one leaves the shape of ``targets``."""
    last = logits.ndim - 1
    if not isinstance(targets, Tensor) or targets.shape == _without(logits.shape, 1):
        return 1
    return last if targets.shape == _without(logits.shape, last) else 1


def _like_output(targets: Tensor, output: Tensor) -> Tensor:
    """``targets`` in the output's shape and type; only dimensions of length 1 may differ."""
    if targets.shape[:1] + targets.squeeze().shape != output.shape[:1] + output.squeeze().shape:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not fit the module's output "
            f"of shape {tuple(output.shape)}: give one target for each output."
        )
    return targets.reshape(output.shape).to(output.dtype)


def _draw_class(logits: Tensor, draws: Draws, smoothing: float) -> Tensor:
    """Class indices by inverse CDF; the classes are the last dimension."""
    cdf = logits.double().softmax(-1).lerp_(_even(logits), smoothing).cumsum(-1)
    level = draws.uniform(logits.shape[:-1], logits.device).unsqueeze(-1) * cdf[..., -1:]
    return (cdf <= level).sum(-1).clamp_max(logits.shape[-1] - 1)


def _even(logits: Tensor) -> Tensor:
    return logits.new_full((), 1 / logits.shape[-1], dtype=torch.float64)


def _draw_yes(probability: Tensor, draws: Draws, smoothing: float) -> Tensor:
    return draws.uniform(probability.shape, probability.device) < probability.lerp(
        torch.full_like(probability, 0.5), smoothing
    )
