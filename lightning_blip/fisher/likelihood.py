"""Likelihoods p(y | output): the log-probability of labels, and labels drawn from them."""

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

#: The target of a position that is left out, as in ``torch.nn.functional.cross_entropy``.
IGNORED = -100


@contextmanager
def _without_validation() -> Iterator[None]:
    """Turn off the validation of distributions.

    It reads the values of tensors, which vmap does not allow in some versions of torch, and its errors do not
    name the batch.
    """
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@dataclass(frozen=True)
class Draws:
    """Random numbers for labels, which do not depend on how samples are divided.

    Samples may be divided into batches and among processes: each label has the same random number.

    Attributes:
        generator: A CPU generator.
        rank: The index of this process; it has the samples rank, rank + processes, rank + 2·processes, …
        processes: The number of processes.
    """

    generator: Generator
    rank: int = 0
    processes: int = 1

    def uniform(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return uniform random numbers in (0, 1); the first dimension is the batch."""
        batch, *rest = shape
        draws = torch.rand(batch * self.processes, *rest, generator=self.generator, dtype=torch.float64)
        # The quantile of 0, which is drawn once in 2**53 times, is infinite in an unbounded distribution.
        return draws[self.rank :: self.processes].clamp_min_(2.0**-54).to(device)


class Likelihood(ABC):
    """A family of distributions p(y | output)."""

    @abstractmethod
    def log_prob(self, output: Any, labels: Tensor) -> Tensor:
        """Return the log-probability of ``labels`` per sample and position: (batch, ...)."""

    @abstractmethod
    def draw(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        """Return labels drawn from p(y | output).

        Args:
            output: The module's output.
            targets: The targets, for the shape of the labels and the positions that are left out.
            draws: The random numbers.
        """

    def from_targets(self, output: Any, targets: Any) -> Tensor:
        """Return the ``targets`` as labels for ``output``; raise a ValueError if they do not fit."""
        if not isinstance(targets, Tensor):
            raise ValueError(
                f'labels="empirical" needs a tensor of targets in each batch, not {type(targets).__name__}: '
                'yield (inputs, targets), or ask for labels="sampled"'
            )
        return targets


class CategoricalLogits(Likelihood):
    """One of C classes per sample, pixel or token.

    Args:
        smoothing: The share of labels that are drawn uniformly.
    """

    def __init__(self, smoothing: float) -> None:
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
    def from_targets(self, output: Any, targets: Any) -> Tensor:
        labels = super().from_targets(output, targets)
        logits = _logits(output)
        expected = _without(logits.shape, _class_dim(logits, labels))
        if labels.shape != expected or labels.is_floating_point():
            raise ValueError(
                f"targets must be class indices of shape {tuple(expected)} for an output of shape "
                f"{tuple(logits.shape)}, not {labels.dtype} of shape {tuple(labels.shape)}"
            )
        return labels.long()


class UnitGaussian(Likelihood):
    """A normal distribution with mean ``output`` and variance 1."""

    @override
    def log_prob(self, output: Any, labels: Tensor) -> Tensor:
        return (_tensor(output) - labels).square().mul(-0.5)

    @override
    def draw(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        mean = _tensor(output).detach()
        noise: Tensor = torch.special.ndtri(draws.uniform(mean.shape, mean.device))
        return noise.to(mean.dtype).add(mean)

    @override
    def from_targets(self, output: Any, targets: Any) -> Tensor:
        return _like_output(super().from_targets(output, targets), _tensor(output))


class BernoulliLogits(Likelihood):
    """0 or 1 per output.

    Args:
        smoothing: The share of labels that are drawn uniformly.
    """

    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing

    @override
    def log_prob(self, output: Any, labels: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(_tensor(output), labels, reduction="none")

    @override
    def draw(self, output: Any, targets: Any, draws: Draws) -> Tensor:
        logits = _tensor(output).detach()
        return _draw_bernoulli(logits.double().sigmoid(), draws, self._smoothing).to(logits.dtype)

    @override
    def from_targets(self, output: Any, targets: Any) -> Tensor:
        return _like_output(super().from_targets(output, targets), _tensor(output))


class FromDistribution(Likelihood):
    """The distribution that a callable makes of the output.

    Args:
        distribution: The callable.
        device: The device of the labels.
        smoothing: The share of labels that are drawn uniformly, from a Categorical or Bernoulli distribution.
    """

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
                f"whose samples have shape {tuple(distribution.batch_shape + distribution.event_shape)}"
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
            drawn = _draw_bernoulli(distribution.probs.double(), draws, self._smoothing)
            return drawn.to(distribution.probs.dtype)
        return self._draw_by_quantile(distribution, draws)

    def _draw_by_quantile(self, distribution: Distribution, draws: Draws) -> Tensor:
        """Return the quantiles of uniform draws, or samples of a distribution that has no ``icdf``."""
        state = draws.generator.get_state()
        level = draws.uniform(distribution.batch_shape + distribution.event_shape, self._device)
        try:
            dtype = distribution.mean.dtype
            eps = torch.finfo(dtype).eps
            # Outside these limits 2·level − 1 is rounded to ±1, whose quantile is infinite.
            return distribution.icdf(level.to(dtype).clamp_(eps / 4, 1 - eps))
        except NotImplementedError:
            draws.generator.set_state(state)
        seed = int(torch.randint(2**62, (), generator=draws.generator)) + draws.rank
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index].manual_seed(seed)
        return distribution.sample()


#: The likelihoods that have a name, made with a given smoothing.
LIKELIHOODS: dict[str, Callable[[float], Likelihood]] = {
    "categorical": CategoricalLogits,
    "gaussian": lambda _: UnitGaussian(),
    "bernoulli": BernoulliLogits,
}


def find_likelihood(
    likelihood: str | Callable[[Any], Distribution], device: torch.device, smoothing: float
) -> Likelihood:
    """Return the likelihood of this name, or the one that a callable defines."""
    if isinstance(likelihood, str):
        return LIKELIHOODS[likelihood](smoothing)
    return FromDistribution(likelihood, device, smoothing)


def _tensor(output: Any) -> Tensor:
    """Return the output, or its ``logits``."""
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"The module returned {type(output).__name__}, not a tensor or an object with .logits: "
            "give a callable as likelihood that makes a torch.distributions.Distribution of it"
        )
    return output


def _logits(output: Any) -> Tensor:
    """Return the logits of classes, which have at least two dimensions."""
    logits = _tensor(output)
    if logits.ndim < 2:
        raise ValueError(
            'likelihood="categorical" needs an output of shape (batch, classes, ...), not '
            f'{tuple(logits.shape)}: give likelihood="bernoulli" for one logit per sample'
        )
    return logits


def _without(shape: torch.Size, dim: int) -> torch.Size:
    return shape[:dim] + shape[dim + 1 :]


def _class_dim(logits: Tensor, targets: Any) -> int:
    """Return the dimension of the classes: 1, or the last if only that fits the shape of ``targets``."""
    last = logits.ndim - 1
    if not isinstance(targets, Tensor) or targets.shape == _without(logits.shape, 1):
        return 1
    return last if targets.shape == _without(logits.shape, last) else 1


def _like_output(targets: Tensor, output: Tensor) -> Tensor:
    """Return ``targets`` in the output's shape and dtype; only dimensions of length 1 may differ."""
    if targets.shape[:1] + targets.squeeze().shape != output.shape[:1] + output.squeeze().shape:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not fit the module's output "
            f"of shape {tuple(output.shape)}: give one target for each output"
        )
    return targets.reshape(output.shape).to(output.dtype)


def _draw_class(logits: Tensor, draws: Draws, smoothing: float) -> Tensor:
    """Return class indices drawn by the inverse CDF; the last dimension of ``logits`` is the classes."""
    cdf = logits.double().softmax(-1).lerp_(_uniform_probability(logits), smoothing).cumsum(-1)
    level = draws.uniform(logits.shape[:-1], logits.device).unsqueeze(-1) * cdf[..., -1:]
    return (cdf <= level).sum(-1).clamp_max(logits.shape[-1] - 1)


def _uniform_probability(logits: Tensor) -> Tensor:
    return logits.new_full((), 1 / logits.shape[-1], dtype=torch.float64)


def _draw_bernoulli(probability: Tensor, draws: Draws, smoothing: float) -> Tensor:
    """Return whether each label is 1, for the ``probability`` of 1."""
    return draws.uniform(probability.shape, probability.device) < probability.lerp(
        torch.full_like(probability, 0.5), smoothing
    )
