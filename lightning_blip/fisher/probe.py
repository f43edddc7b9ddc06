"""Find out on two samples for which parameters the rules give the right gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_blip.fisher.fallback import Fallback, naming
from lightning_blip.fisher.gradients import BUDGET_BYTES, SampleGradients, project, sum_of_uses
from lightning_blip.fisher.layout import Layout, find_layouts
from lightning_blip.fisher.likelihood import Draws
from lightning_blip.fisher.model import Model
from lightning_blip.fisher.recorder import Call, Key, Recorder, backward
from lightning_blip.fisher.rounding import agree, tolerance
from lightning_blip.fisher.rule_based import RuleBased
from lightning_blip.fisher.samples import Batch


def probe(model: Model, wanted: Mapping[str, nn.Parameter], batch: Batch) -> tuple[RuleBased, Fallback]:
    """Divide the ``wanted`` parameters between the rules and the fallback.

    A rule covers one operation. It separates samples by their places in a tensor: the places where the
    gradient of one sample is zero belong to the others. It is wrong where a parameter is also used in a way
    that is not recorded, or where samples share places. So the gradients by rule, summed over two samples,
    are compared with those of autograd.

    Args:
        model: The module, in evaluation mode, and its likelihood.
        wanted: The parameters to estimate, by name.
        batch: One or two samples with their targets.

    Returns:
        The parameters with a right rule, and the fallback for all others.

    Raises:
        ValueError: If the samples of a batch influence each other.
    """
    with Recorder(model.module, wanted) as recorder:
        # A separate generator: the caller's generator must not depend on the probe.
        batch, log_probs = model.label(batch, Draws(Generator().manual_seed(0)))
    _check_independence(model, batch[-1:], log_probs[-1:])
    with naming(wanted):
        _, of_first = _backward(log_probs[0], recorder, [])
        by_rules = RuleBased(dict(wanted), _layouts(recorder.calls, of_first, batch.size))
        right: set[str] = set()
        for names in _within_budget(wanted):
            right |= _agreeing(by_rules, recorder, names, log_probs)
    for call in recorder.calls:
        call.release()
    right -= recorder.without_rule
    by_rules.parameters = {name: p for name, p in wanted.items() if name in right}
    fallback = Fallback(model, {name: p for name, p in wanted.items() if name not in right})
    fallback.choose(batch[:1])
    return by_rules, fallback


def _backward(
    total: Tensor, recorder: Recorder, leaves: Sequence[Tensor]
) -> tuple[list[Tensor | None], dict[Call, Tensor]]:
    """Return the gradients of ``total`` with respect to ``leaves``, and to the output of every call."""
    received: dict[Call, Tensor] = {}
    for call in recorder.calls:
        call.on_gradient = partial(received.__setitem__, call)
    return backward(total, recorder.calls, leaves, again=True), received


def _layouts(calls: Sequence[Call], of_first: Mapping[Call, Tensor], count: int) -> dict[Key, Layout]:
    """Return for each kind of call the first layout that fits all calls of this kind."""
    fitting: dict[Key, list[Layout]] = {}
    for call in calls:
        if call in of_first:
            layouts = list(find_layouts(of_first[call], count))
            before = fitting.get(call.key, layouts)
            fitting[call.key] = [layout for layout in before if layout in layouts]
    return {key: layouts[0] for key, layouts in fitting.items() if layouts}


def _within_budget(wanted: Mapping[str, nn.Parameter]) -> Iterator[list[str]]:
    """Yield lists of parameter names; the gradients of one list fit in the memory budget together."""
    names: list[str] = []
    size = 0
    for name, parameter in wanted.items():
        added = parameter.numel() * parameter.element_size()
        if names and size + added > BUDGET_BYTES // 2:
            yield names
            names, size = [], 0
        names.append(name)
        size += added
    yield names


def _agreeing(by_rules: RuleBased, recorder: Recorder, names: Sequence[str], log_probs: Tensor) -> set[str]:
    """Return the names whose gradients by rule agree with autograd's, projected on a random direction."""
    # The weights differ, so that the errors of two samples do not cancel.
    weights = torch.arange(1, len(log_probs) + 1, dtype=log_probs.dtype, device=log_probs.device)
    true, received = _backward(log_probs @ weights, recorder, [by_rules.parameters[name] for name in names])
    expected: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, grad in zip(names, true, strict=True):
        parameter = by_rules.parameters[name].detach()
        direction = _direction(parameter)
        expected[name] = project(torch.zeros_like(parameter) if grad is None else grad, direction)
        parts = _parts(by_rules, recorder, received, name, len(log_probs))
        if parts:
            found[name] = sum_of_uses(parts).projected_sum(direction)
        elif parts is not None and grad is None:
            found[name] = torch.zeros_like(expected[name])
    largest = max(float(value.norm()) for value in expected.values())
    return {name for name in found if agree(found[name], expected[name], largest)}


def _direction(parameter: Tensor) -> Tensor:
    """Return a random direction in all dimensions of ``parameter`` but the first."""
    size = parameter[0].numel() if parameter.ndim > 1 else 1
    return torch.randn(size, generator=Generator().manual_seed(0), dtype=torch.float64).to(parameter)


def _parts(
    by_rules: RuleBased, recorder: Recorder, received: Mapping[Call, Tensor], name: str, count: int
) -> list[SampleGradients] | None:
    """Return a parameter's gradients in each of its uses; None if a rule does not fit one of them."""
    parts: list[SampleGradients] = []
    for call, use in by_rules.uses_of(recorder, name):
        if call not in received:  # the log-probabilities do not depend on the output
            continue
        if count > 1 and call.key not in by_rules.layouts:
            return None
        try:
            parts.append(by_rules.gradients(call, use, name, received[call], count))
        except (IndexError, RuntimeError, ValueError):  # the rule does not fit these shapes
            return None
    return parts


def _check_independence(model: Model, alone: Batch, together: Tensor) -> None:
    """Raise a ValueError unless a sample has the same log-probability alone as together with others."""
    try:
        log_prob = model.log_prob(alone)
    except Exception as error:
        raise ValueError(_influence(model.module, "cannot be evaluated alone")) from error
    allowed = tolerance(log_prob)
    if not torch.allclose(log_prob, together, rtol=allowed, atol=allowed):
        raise ValueError(_influence(model.module, "has a different log-probability alone"))


def _influence(module: nn.Module, symptom: str) -> str:
    norms = [
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if isinstance(part, _NormBase) and (part.training or part.running_mean is None)
        for name in part._parameters
    ]
    culprits = f" (see {', '.join(norms)}: a norm over the batch)" if norms else ""
    return (
        f"The samples of a batch influence each other{culprits}: a sample {symptom}, so that there are no "
        "per-sample gradients. Make the module treat each sample separately in evaluation mode, for example "
        "with track_running_stats=True."
    )
