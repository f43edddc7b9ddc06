"""A look at two samples before the first batch: which parameters may be left to their layer's rule?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_blip.fisher.batches import Batch
from lightning_blip.fisher.fallback import PerSample, naming, tolerance
from lightning_blip.fisher.model import Model
from lightning_blip.fisher.rules import Call, RuledLayer, backward, find_layers, recording

ROUNDING = 1e-6  # of the norm that a sum would have if none of its terms cancelled


def probe(
    model: Model, wanted: Mapping[str, nn.Parameter], batch: Batch
) -> tuple[list[RuledLayer], PerSample]:
    """Divides the ``wanted`` parameters between the rules and the fallback.

    A rule sees only the calls of its layer. It is wrong where a weight has other uses (tied weights,
    ``F.linear(x, layer.weight)``) and where the layer's first dimension is not the batch. So its gradients,
    summed over two samples, are compared with autograd's, and the inputs of its layer for the first of them
    with those that it has when this sample is alone.

    Args:
        model: The module, in evaluation mode, and its likelihood.
        wanted: The parameters to estimate, by name.
        batch: One or two samples and the data's targets.

    Returns:
        The layers whose rules hold, each with the names of the parameters it may serve, and the fallback for
        all other parameters.

    Raises:
        ValueError: If the samples of a batch influence each other.
    """
    layers = find_layers(model.module, wanted)
    with recording(layers):
        # Labels of its own: the caller's generator must not depend on this look.
        batch, together = model.label(batch, Generator().manual_seed(0))
    # Unequal weights, so that the errors of two samples do not cancel.
    total = together @ torch.arange(1, batch.size + 1, dtype=together.dtype, device=together.device)
    with naming(wanted):
        true = dict(zip(wanted, backward(total, layers, list(wanted.values())), strict=True))
    for ruled in layers:
        ruled.names = {
            role: name for role, name in ruled.names.items() if _agrees(ruled, role, true[name], batch)
        }

    calls = [list(ruled.calls) for ruled in layers]
    alone = batch[:1]
    with recording(layers):
        _check_alone(model, alone, together)
    layers = [
        ruled
        for ruled, before in zip(layers, calls, strict=True)
        if ruled.names and _separates(ruled, before)
    ]
    served = {name for ruled in layers for name in ruled.names.values()}
    rest = PerSample(model, {name: p for name, p in wanted.items() if name not in served})
    rest.choose(alone)
    return layers, rest


def _agrees(ruled: RuledLayer, role: str, true: Tensor | None, batch: Batch) -> bool:
    """Whether a rule gives autograd's gradient, compared along a random direction of the layer's inputs."""
    if not ruled.is_batch_first(batch.size):
        return False
    parameter = ruled.layer.get_parameter(role).detach()
    true = torch.zeros_like(parameter) if true is None else true
    direction = torch.randn(parameter[0].numel(), generator=Generator().manual_seed(0), dtype=torch.float64)
    direction = direction.to(parameter)
    found, terms = ruled.projected(role, direction)
    expected = true.flatten(1) @ direction if role == "weight" else true
    return bool((found - expected).norm() <= tolerance(expected) * expected.norm() + ROUNDING * terms.norm())


def _separates(ruled: RuledLayer, together: list[Call]) -> bool:
    """Whether the layer's inputs for a sample alone are those that it had first among several."""
    return (
        ruled.is_batch_first(1)
        and len(ruled.calls) == len(together)
        and all(_close(now.inputs, then.inputs[:1]) for now, then in zip(ruled.calls, together, strict=True))
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).norm() <= tolerance(expected) * expected.norm()
    )


def _check_alone(model: Model, alone: Batch, together: Tensor) -> None:
    """Raises an error unless a sample has the same log-probability alone as it had among several."""
    try:
        log_prob = model.log_prob(alone)
    except Exception as error:
        raise ValueError(_influence(model.module, "cannot be evaluated alone")) from error
    allowed = tolerance(log_prob)
    if not torch.allclose(log_prob, together[:1], rtol=allowed, atol=allowed):
        raise ValueError(_influence(model.module, "has another log-probability alone"))


def _influence(module: nn.Module, symptom: str) -> str:
    of_batch = [
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if isinstance(part, _NormBase) and (part.training or part.running_mean is None)
        for name in part._parameters
    ]
    culprits = f" (see {', '.join(of_batch)}: a norm over the batch)" if of_batch else ""
    return (
        f"The samples of a batch influence each other{culprits}: a sample {symptom}, so that it has no "
        "gradient of its own. Let the module treat each sample by itself in evaluation mode, for example "
        "with track_running_stats=True."
    )
