"""A look at two samples before the first batch: which parameters may be left to rules?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_blip.fisher.batches import Batch
from lightning_blip.fisher.fallback import PerSample, naming, tolerance
from lightning_blip.fisher.gradients import BUDGET_BYTES, SampleGradients, add, along
from lightning_blip.fisher.layout import Layout, layouts_of
from lightning_blip.fisher.likelihood import Draws
from lightning_blip.fisher.model import Model
from lightning_blip.fisher.recorder import Call, Key, Recorder, backward
from lightning_blip.fisher.ruled import Ruled

ROUNDING = 1e-6  # of the largest gradient's norm


def probe(model: Model, wanted: Mapping[str, nn.Parameter], batch: Batch) -> tuple[Ruled, PerSample]:
    """Divides the ``wanted`` parameters between the rules and the fallback.

    Rules see operations one by one, and tell samples apart by their place: what the gradient of one sample
    does not reach belongs to others. They are wrong where a parameter is also used out of their sight, and
    where a sample has no place of its own. So the gradients by rule, summed over two samples, are compared
    with autograd's.

    Args:
        model: The module, in evaluation mode, and its likelihood.
        wanted: The parameters to estimate, by name.
        batch: One or two samples and the data's targets.

    Returns:
        The parameters whose rules hold, and the fallback for all others.

    Raises:
        ValueError: If the samples of a batch influence each other.
    """
    with Recorder(model.module, wanted) as recorder:
        # Labels of its own: the caller's generator must not depend on this look.
        batch, log_probs = model.label(batch, Draws(Generator().manual_seed(0)))
    _check_alone(model, batch[-1:], log_probs[-1:])
    with naming(wanted):
        _, of_first = _backward(log_probs[0], recorder, [])
        ruled = Ruled(dict(wanted), _layouts(recorder.calls, of_first, batch.size))
        right: set[str] = set()
        for names in _within_budget(wanted):
            right |= _agreeing(ruled, recorder, names, log_probs)
    for call in recorder.calls:
        call.forget()
    right -= recorder.unruled
    ruled.parameters = {name: p for name, p in wanted.items() if name in right}
    rest = PerSample(model, {name: p for name, p in wanted.items() if name not in right})
    rest.choose(batch[:1])
    return ruled, rest


def _backward(
    total: Tensor, recorder: Recorder, leaves: Sequence[Tensor]
) -> tuple[list[Tensor | None], dict[Call, Tensor]]:
    """The gradients of ``total`` with respect to ``leaves`` and to the output of every call."""
    received: dict[Call, Tensor] = {}
    for call in recorder.calls:
        call.receive = partial(received.__setitem__, call)
    return backward(total, recorder.calls, leaves, again=True), received


def _layouts(calls: Sequence[Call], of_first: Mapping[Call, Tensor], count: int) -> dict[Key, Layout]:
    """For each kind of call the first layout that fits all calls of this kind."""
    fitting: dict[Key, list[Layout]] = {}
    for call in calls:
        if call in of_first:
            layouts = list(layouts_of(of_first[call], count))
            before = fitting.get(call.key, layouts)
            fitting[call.key] = [layout for layout in before if layout in layouts]
    return {key: layouts[0] for key, layouts in fitting.items() if layouts}


def _within_budget(wanted: Mapping[str, nn.Parameter]) -> Iterator[list[str]]:
    """Names of parameters, as many at a time as may have their gradients side by side."""
    names: list[str] = []
    size = 0
    for name, parameter in wanted.items():
        own = parameter.numel() * parameter.element_size()
        if names and size + own > BUDGET_BYTES // 2:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def _agreeing(ruled: Ruled, recorder: Recorder, names: Sequence[str], log_probs: Tensor) -> set[str]:
    """Those of the parameters whose gradients by rule are autograd's, along a random direction."""
    # Unequal weights, so that the errors of two samples do not cancel.
    weights = torch.arange(1, len(log_probs) + 1, dtype=log_probs.dtype, device=log_probs.device)
    true, received = _backward(log_probs @ weights, recorder, [ruled.parameters[name] for name in names])
    expected: dict[str, Tensor] = {}
    found: dict[str, Tensor | None] = {}
    for name, grad in zip(names, true, strict=True):
        parameter = ruled.parameters[name].detach()
        direction = _direction(parameter)
        expected[name] = along(torch.zeros_like(parameter) if grad is None else grad, direction)
        parts = _parts(ruled, recorder, received, name, len(log_probs))
        if parts is None or (not parts and grad is not None):
            found[name] = None
        else:
            found[name] = add(parts).total_along(direction) if parts else torch.zeros_like(expected[name])
    largest = max(float(value.norm()) for value in expected.values())
    return {
        name
        for name, value in expected.items()
        if (got := found[name]) is not None
        and (got - value).norm() <= tolerance(value) * value.norm() + ROUNDING * largest
    }


def _direction(parameter: Tensor) -> Tensor:
    size = parameter[0].numel() if parameter.ndim > 1 else 1
    return torch.randn(size, generator=Generator().manual_seed(0), dtype=torch.float64).to(parameter)


def _parts(
    ruled: Ruled, recorder: Recorder, received: Mapping[Call, Tensor], name: str, count: int
) -> list[SampleGradients] | None:
    """A parameter's gradients in each of its uses; None where the rule does not know one of them."""
    parts: list[SampleGradients] = []
    for call, use in ruled.uses_of(recorder, name):
        if call not in received:  # the output has no part in the log-probabilities
            continue
        if count > 1 and call.key not in ruled.layouts:
            return None
        try:
            parts.append(ruled.gradients(call, use, name, received[call], count))
        except (IndexError, RuntimeError, ValueError):  # shapes that this rule does not know
            return None
    return parts


def _check_alone(model: Model, alone: Batch, together: Tensor) -> None:
    """Raises an error unless a sample has the same log-probability alone as it had among several."""
    try:
        log_prob = model.log_prob(alone)
    except Exception as error:
        raise ValueError(_influence(model.module, "cannot be evaluated alone")) from error
    allowed = tolerance(log_prob)
    if not torch.allclose(log_prob, together, rtol=allowed, atol=allowed):
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
