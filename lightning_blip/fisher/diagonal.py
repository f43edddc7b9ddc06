"""``diagonal_fisher``: one forward and one backward pass per batch, one squared gradient per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution

from lightning_blip.fisher.batches import Batch, read
from lightning_blip.fisher.gradients import Observer
from lightning_blip.fisher.isolation import left_as_before
from lightning_blip.fisher.likelihood import Draws, find_likelihood
from lightning_blip.fisher.model import Model
from lightning_blip.fisher.probe import probe
from lightning_blip.fisher.recorder import Recorder
from lightning_blip.fisher.ruled import Ruled


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
    r"""The diagonal of the Fisher information matrix of any module, one value for each parameter.

    For each parameter :math:`\theta` it is the mean over samples of
    :math:`(\partial \log p(y | x, \theta) / \partial \theta)^2`: one gradient per sample, squared before it
    is averaged, in evaluation mode. How the samples are divided into batches does not matter. The module, its
    gradients, modes and buffers and the global random numbers are afterwards as they were before.

    One forward and one backward pass over each batch serve all parameters for whose operations there is a
    rule, which costs little more than a training step: linear maps, convolutions and transposed ones,
    embeddings, norms, attention, recurrent layers, sums and products with parameters of one's own; whichever
    module they stand in, tied, computed from other parameters or used several times. All other parameters
    are as exact, but slower: they take per-sample gradients by ``torch.func``, or else sample by sample.
    Beside the activations, temporaries take 256 MiB at most, or one sample's gradients if these are larger.

    This is the measure of information of Shi et al., "Continual Learning via Bit-Level Information
    Preserving" (CVPR 2021), section 3. With labels drawn from the model's own prediction it is the Fisher
    information; with the data's labels it is the "empirical" Fisher, which is another thing: see Martens,
    "New Insights and Perspectives on the Natural Gradient Method" (JMLR 2020).

    Args:
        module: Any module whose samples do not influence each other in evaluation mode.
        batches: Yields pairs ``(inputs, targets)``. ``inputs`` is a tensor, a tuple or list of positional
            arguments or a dict of keyword arguments. The first dimension of its first tensor is the batch;
            other tensors whose first dimension is as long are divided along with it, all others are shared by
            the samples. Everything is moved to the module's device.
        likelihood: How the output, or its ``logits`` attribute, gives p(y | x). ``"categorical"``: logits,
            with the classes along dimension 1 or, if only this fits the shape of the targets, along the last
            one; positions whose target is -100 are left out. ``"gaussian"``: a normal distribution of
            variance 1 around each output. ``"bernoulli"``: one logit for each output. Or a callable that
            makes a ``torch.distributions.Distribution`` of the output.
        labels: ``"sampled"`` draws y from the model's own p(y | x); ``"empirical"`` takes the targets.
        samples: The largest number of samples to use; default, all.
        generator: A CPU generator for the labels; default, a new one seeded with 0. The labels drawn do not
            depend on the division into batches, except those of a distribution without ``icdf``.
        smoothing: Labels are drawn from (1 − smoothing)·p(y | x) + smoothing·uniform, where they are classes
            or yes and no. With 0 it is the Fisher information, which vanishes where the module is sure.
        parameters: The names of the parameters to estimate; default, all that require gradients.
        observers: See the same gradients, for more than their squares.
        shard: (k, n) where n processes have every n-th sample each, this one those from the k-th on: labels
            are then drawn as by one process that has them all. The estimate is of this shard.
        parts: Into how many each batch is divided, where its samples at once take too much memory.
        progress: Called with the number of samples done since its last call.

    Returns:
        The diagonal Fisher information by parameter name, of each parameter's shape, device and dtype, but at
        least float32. It is zero for a parameter that the module does not use.

    Raises:
        ValueError: If an argument or a batch is not of the kind described above, or if the samples of a batch
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
    if labels not in ("sampled", "empirical"):
        raise ValueError(f'labels={labels!r} is not known: give "sampled" or "empirical".')
    if not 0 <= smoothing <= 1:
        raise ValueError(
            f"smoothing={smoothing} must be 0, for the module's own prediction, to 1, for none of it."
        )
    if samples is not None and samples < 1:
        raise ValueError(
            f"samples={samples} leaves nothing to estimate from: give at least 1, or None for all."
        )
    wanted = _wanted(module, parameters)
    device = next(iter(wanted.values())).device
    model = Model(module, find_likelihood(likelihood, device, smoothing), sampled=labels == "sampled")
    draws = Draws(Generator().manual_seed(0) if generator is None else generator, *shard)
    observers = list(observers)
    done = probed = 0
    with left_as_before(module, device, wanted.values()):
        sums = {
            name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in wanted.items()
        }
        for batch in read(batches, samples, device, parts):
            if probed < min(batch.size, 2):  # a first batch of one sample says nothing about batches
                probed = min(batch.size, 2)
                ruled, rest = probe(model, wanted, batch[:probed])
            with Recorder(module, wanted) as recorder:
                batch, log_prob = model.label(batch, draws)
            if not ruled.covers(recorder, batch.size):
                ruled, rest = probe(model, wanted, batch[:2])
                _check_covers(ruled, recorder, batch)
            ruled.add_squares(log_prob.sum(), recorder, batch.size, sums, observers)
            rest.add_squares(batch, sums)
            for observer in observers:
                observer.end_batch(batch.size)
            done += batch.size
            if progress is not None:
                progress(batch.size)
    if not done:
        raise ValueError("batches held no sample: give an iterable that yields (inputs, targets).")
    return {name: total.div_(done) for name, total in sums.items()}


def _wanted(module: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    known = dict(module.named_parameters())
    if names is None:
        names = [name for name, p in known.items() if p.requires_grad]
    wanted = {}
    for name in names:
        if name not in known:
            raise ValueError(f"parameters: the module has no parameter {name!r}; it has {', '.join(known)}.")
        if not known[name].is_floating_point():
            raise ValueError(
                f"parameters: {name!r} is {known[name].dtype}, not real floating point: leave it out."
            )
        if not known[name].requires_grad:
            raise ValueError(
                f"parameters: {name!r} does not require gradients: leave it out, or set requires_grad first."
            )
        wanted[name] = known[name]
    if not wanted:
        raise ValueError(
            "parameters: there is none to estimate; give the name of one that requires gradients."
        )
    return wanted


def _check_covers(ruled: Ruled, recorder: Recorder, batch: Batch) -> None:
    if not ruled.covers(recorder, batch.size):
        raise RuntimeError(
            f"The module uses its parameters in other ways for the {batch.size} samples of batch "
            f"{batch.index} together than for two of them: let its operations not depend on how many there "
            f"are, or leave out with parameters=[...] what is used so, among {', '.join(ruled.parameters)}."
        )
