"""``diagonal_fisher``: one forward and one backward pass per batch, one squared gradient per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution

from lightning_blip.fisher.arguments import check_labels, check_likelihood, check_samples, check_smoothing
from lightning_blip.fisher.gradients import Observer
from lightning_blip.fisher.isolation import left_as_before
from lightning_blip.fisher.likelihood import Draws, find_likelihood
from lightning_blip.fisher.model import Model
from lightning_blip.fisher.probe import probe
from lightning_blip.fisher.recorder import Recorder
from lightning_blip.fisher.rule_based import RuleBased
from lightning_blip.fisher.samples import Batch, read_batches


def diagonal_fisher(
    module: nn.Module,
    batches: Iterable[Any],
    likelihood: str | Callable[[Any], Distribution] = "categorical",
    labels: str = "sampled",
    samples: int | None = None,
    generator: Generator | None = None,
    *,
    smoothing: float = 0.0,
    parameters: Iterable[str] | None = None,
    observers: Iterable[Observer] = (),
    shard: tuple[int, int] = (0, 1),
    parts: int = 1,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Tensor]:
    r"""Return the diagonal of the Fisher information matrix of any module: one value per parameter.

    For each parameter :math:`\theta` it is the mean over samples of
    :math:`(\partial \log p(y | x, \theta) / \partial \theta)^2`. There is one gradient per sample, squared
    before it is averaged, in evaluation mode. The result does not depend on how the samples are divided into
    batches. Afterwards the module, its gradients, modes and buffers, and the global random number generators
    are as before.

    One forward and one backward pass per batch give the gradients of all parameters whose operations have a
    rule; this costs little more than a training step. There are rules for linear maps, convolutions and
    transposed convolutions, embeddings, norms, attention, recurrent layers, and sums and products with
    parameters. They apply in any module, also to parameters that are tied, computed from other parameters or
    used several times. All other parameters are as exact, but slower: their per-sample gradients are computed
    by ``torch.func``, or else one sample at a time. Beside the activations, temporaries take at most 256 MiB,
    or the gradients of one sample if these are larger.

    This is the measure of information of Shi et al., "Continual Learning via Bit-Level Information
    Preserving" (CVPR 2021), section 3. With labels drawn from the model's prediction it is the Fisher
    information. With the targets as labels it is the "empirical" Fisher, which is a different quantity: see
    Martens, "New Insights and Perspectives on the Natural Gradient Method" (JMLR 2020).

    Args:
        module: Any module whose samples do not influence each other in evaluation mode.
        batches: Yields pairs ``(inputs, targets)``. ``inputs`` is a tensor, a tuple or list of positional
            arguments or a dict of keyword arguments. The first dimension of its first tensor is the batch.
            Other tensors with a first dimension of the same length are divided into samples too; all samples
            share the others. Everything is moved to the module's device.
        likelihood: How the output, or its ``logits`` attribute, gives p(y | x). ``"categorical"``: logits,
            with the classes along dimension 1 or, if only this fits the shape of the targets, along the last
            one; positions whose target is -100 are left out. ``"gaussian"``: a normal distribution of
            variance 1 around each output. ``"bernoulli"``: one logit per output. Or a callable that makes a
            ``torch.distributions.Distribution`` of the output.
        labels: ``"sampled"`` draws y from the model's p(y | x); ``"empirical"`` takes the targets.
        samples: The largest number of samples to use; default, all.
        generator: A CPU generator for the labels; default, a new one seeded with 0. The labels drawn do not
            depend on the division into batches, except those of a distribution without ``icdf``.
        smoothing: Labels are drawn from (1 − smoothing)·p(y | x) + smoothing·uniform, in a categorical or
            Bernoulli distribution. With 0 the result is the Fisher information, which vanishes where the
            model is certain.
        parameters: The names of the parameters to estimate; default, all that require gradients.
        observers: Objects that receive the same per-sample gradients.
        shard: (k, n) where n processes share the samples: this one has the samples k, k + n, k + 2n, … Labels
            are drawn as in one process that has all samples. The estimate is of this shard.
        parts: The number of parts that each batch is divided into, to save memory.
        progress: Called after each batch, or part of a batch, with its number of samples.

    Returns:
        The diagonal Fisher information by parameter name. Each tensor has its parameter's shape, device and
        dtype, but at least float32. It is zero for a parameter that the module does not use.

    Raises:
        ValueError: If an argument or a batch is not as described above, or if the samples of a batch
            influence each other.
        TypeError: If the output is not a tensor and ``likelihood`` is not a callable.
        FloatingPointError: If a log-probability is not finite.
        RuntimeError: If a parameter has no per-sample gradients, or a layer's first dimension is the batch in
            the first batch but not in a later one.

    Example:
        >>> import torch
        >>> from lightning_blip.fisher import diagonal_fisher
        >>> layer = torch.nn.Linear(1, 1, bias=False)  # a Gaussian around w·x has the information x²
        >>> inputs = torch.tensor([[1.0], [3.0]]).repeat(2_000, 1)
        >>> fisher = diagonal_fisher(layer, [(inputs, None)], likelihood="gaussian")
        >>> abs(fisher["weight"].item() - 5.0) < 0.3
        True
    """
    check_labels(labels)
    check_smoothing(smoothing)
    check_samples(samples)
    check_likelihood(likelihood)
    wanted = _find_parameters(module, parameters)
    device = next(iter(wanted.values())).device
    model = Model(module, find_likelihood(likelihood, device, smoothing), sampled=labels == "sampled")
    draws = Draws(Generator().manual_seed(0) if generator is None else generator, *shard)
    with left_as_before(module, device, wanted.values()):
        estimate = _Estimate(model, wanted, draws, list(observers))
        for batch in read_batches(batches, samples, device, parts):
            estimate.add(batch)
            if progress is not None:
                progress(batch.size)
    return estimate.mean()


class _Estimate:
    """Sums of squared per-sample gradients, batch by batch."""

    def __init__(
        self, model: Model, wanted: Mapping[str, nn.Parameter], draws: Draws, observers: Sequence[Observer]
    ) -> None:
        self._model = model
        self._wanted = wanted
        self._draws = draws
        self._observers = observers
        self._samples = 0
        self._probed = 0
        self._sums = {
            name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in wanted.items()
        }

    def add(self, batch: Batch) -> None:
        """Add the squared gradients of the samples of ``batch``."""
        if self._probed < min(batch.size, 2):  # one sample does not show where the samples of a batch are
            self._probed = min(batch.size, 2)
            self._probe(batch[: self._probed])
        with Recorder(self._model.module, self._wanted) as recorder:
            batch, log_prob = self._model.label(batch, self._draws)
        if not self._by_rules.covers(recorder, batch.size):
            self._probe(batch[:2])
            _check_covers(self._by_rules, recorder, batch)
        self._by_rules.add_squares(log_prob.sum(), recorder, batch.size, self._sums, self._observers)
        self._fallback.add_squares(batch, self._sums)
        for observer in self._observers:
            observer.end_batch(batch.size)
        self._samples += batch.size

    def mean(self) -> dict[str, Tensor]:
        """Return the mean over all samples, computed in the memory of the sums."""
        if not self._samples:
            raise ValueError("batches held no sample: give an iterable that yields (inputs, targets)")
        return {name: total.div_(self._samples) for name, total in self._sums.items()}

    def _probe(self, batch: Batch) -> None:
        self._by_rules, self._fallback = probe(self._model, self._wanted, batch)


def _find_parameters(module: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """Return the parameters to estimate, by name; raise a ValueError if one cannot be estimated."""
    known = dict(module.named_parameters())
    if names is None:
        names = [name for name, p in known.items() if p.requires_grad]
    wanted = {}
    for name in names:
        if name not in known:
            raise ValueError(
                f"parameters: the module has no parameter {name!r}: give some of {', '.join(known)}"
            )
        if not known[name].is_floating_point():
            raise ValueError(
                f"parameters: {name!r} is {known[name].dtype}, not real floating point: leave it out"
            )
        if not known[name].requires_grad:
            raise ValueError(
                f"parameters: {name!r} does not require gradients: leave it out, or set requires_grad first"
            )
        wanted[name] = known[name]
    if not wanted:
        raise ValueError(
            "parameters: there is none to estimate: give the name of one that requires gradients"
        )
    return wanted


def _check_covers(by_rules: RuleBased, recorder: Recorder, batch: Batch) -> None:
    """Raise a RuntimeError if the rules do not give complete gradients for ``batch``."""
    if not by_rules.covers(recorder, batch.size):
        raise RuntimeError(
            f"The module uses its parameters in other ways for the {batch.size} samples of batch "
            f"{batch.index} together than for two of them: make its operations independent of the number of "
            "samples, or leave out with parameters=[...] the parameters that are used in other ways, among "
            f"{', '.join(by_rules.parameters)}"
        )
