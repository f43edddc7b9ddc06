"""The optimizer wrapper that keeps every parameter inside what its frozen bits allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_blip.bits import FrozenBits

Closure = Callable[[], Any]


class FrozenBitsOptimizer(Optimizer):
    """Wraps any ``torch.optim.Optimizer`` so that its steps respect frozen bits.

    Before a step, values with all bits frozen lose their gradient (and, after it, their momentum). After the
    step, for every parameter θ with a frozen state, in this order: the update is scaled by 2^(−p·bits); θ is
    pulled towards its anchor, θ ← θ* + (θ − θ*)/(1 + η·λ·(S_t − S_0)); θ is projected into its cell. The
    update that is scaled is the one the optimizer made, so the scale means the same for SGD and Adam.

    The wrapper shares groups, state and hooks with the wrapped optimizer, and works through the latter's own
    step hooks: schedulers, gradient scalers and loops may hold either of the two. Post-step hooks see
    the projected values.

    Args:
        optimizer: The optimizer to wrap.
        frozen: The frozen state of each parameter to protect. States may be consolidated between steps.
        scale: p, how strongly frozen bits slow a parameter down; 0 leaves the step as it is.
        pull: λ, how strongly a parameter is drawn to its anchor; 0 does not.

    Raises:
        ValueError: If ``scale`` or ``pull`` is negative, or the optimizer is wrapped already.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([0.3, -0.6]))
        >>> frozen = FrozenBits.of(theta, bound=1.0, prior=1.0)
        >>> frozen.freeze(theta.data, bits=torch.tensor([2, 0]), keep_free_bits=True)
        >>> optimizer = FrozenBitsOptimizer(torch.optim.SGD([theta], lr=1.0), {theta: frozen})
        >>> theta.grad = torch.tensor([0.25, 0.25])
        >>> optimizer.step()
        >>> theta.data
        tensor([ 0.2500, -0.8500])

    Source:
        BLIP (Shi et al., CVPR 2021), section 3.3, for the projection. The pull is the proximal step of the
        quadratic penalty of EWC (Kirkpatrick et al., PNAS 2017).
    """

    # Optimizer.__init__ is not called: groups, state and hooks have one owner, the wrapped optimizer.
    def __init__(
        self,
        optimizer: Optimizer,
        frozen: Mapping[Tensor, FrozenBits],
        scale: float = 0.0,
        pull: float = 0.0,
    ) -> None:
        if isinstance(optimizer, FrozenBitsOptimizer):
            raise ValueError(f"optimizer={optimizer!r} is wrapped already: pass its .optimizer instead")
        check_strengths(scale=scale, pull=pull)
        self.optimizer = optimizer
        self.frozen = frozen
        self.scale = scale
        self.pull = pull
        self._walls: list[_Walls] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # First among the post-hooks: the user's own then see the projected values.
        optimizer._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def step(self, closure: Closure | None = None) -> Any:
        """Takes one step of the wrapped optimizer, inside what the frozen bits allow.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the wrapped optimizer returns.
        """
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state: a checkpoint is the same with the wrapper and without."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)
        self._walls = None

    def __repr__(self) -> str:
        return f"FrozenBitsOptimizer({self.optimizer!r}, scale={self.scale}, pull={self.pull})"

    # A fused optimizer reads these two from itself, a gradient scaler sets them on the one it is given.
    @property
    def grad_scale(self) -> Any:
        """The gradient scaler's factor, for fused optimizers."""
        return self.optimizer.grad_scale  # type: ignore[attr-defined]

    @grad_scale.setter
    def grad_scale(self, value: Any) -> None:
        self.optimizer.grad_scale = value  # type: ignore[attr-defined]

    @grad_scale.deleter
    def grad_scale(self) -> None:
        del self.optimizer.grad_scale  # type: ignore[attr-defined]

    @property
    def found_inf(self) -> Any:
        """Whether the gradient scaler found an infinite gradient, for fused optimizers."""
        return self.optimizer.found_inf  # type: ignore[attr-defined]

    @found_inf.setter
    def found_inf(self, value: Any) -> None:
        self.optimizer.found_inf = value  # type: ignore[attr-defined]

    @found_inf.deleter
    def found_inf(self) -> None:
        del self.optimizer.found_inf  # type: ignore[attr-defined]

    def unwrap(self) -> Optimizer:
        """Takes the freezing off again.

        Returns:
            The wrapped optimizer, as it was before.
        """
        for handle in self._handles:
            handle.remove()
        return self.optimizer

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._walls is None or any(walls.outdated for walls in self._walls):
            self._walls = self._build_walls(optimizer)
        for walls in self._walls:
            walls.remember()
        closure = kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
        if closure is None:
            self._mask_gradients()
            return None

        def masked_closure() -> Any:
            loss = closure()
            self._mask_gradients()
            return loss

        return args[:1], {**kwargs, "closure": masked_closure}

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for walls in self._walls or ():
            walls.hold_back()
            for theta, everything in walls.unmovable:
                for value in optimizer.state.get(theta, {}).values():
                    if isinstance(value, Tensor) and value.shape == theta.shape:
                        value.masked_fill_(everything, 0)

    def _mask_gradients(self) -> None:
        for walls in self._walls or ():
            for theta, everything in walls.unmovable:
                if theta.grad is not None:
                    theta.grad.masked_fill_(everything, 0)

    def _build_walls(self, optimizer: Optimizer) -> list[_Walls]:
        every = []
        for group in optimizer.param_groups:
            protected = [(theta, self.frozen[theta]) for theta in group["params"] if theta in self.frozen]
            for learned in (False, True):
                states = [(theta, frozen) for theta, frozen in protected if bool(frozen.tasks) is learned]
                if states:
                    every.append(_Walls(optimizer, group, states, self.scale, self.pull))
        return every


class _Walls:
    """What a step needs to know of the parameters of one group, as lists for the ``_foreach_`` kernels.

    All of the group's parameters have learned a task, or none has: then only the bound B holds them.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        states: list[tuple[Tensor, FrozenBits]],
        scale: float,
        pull: float,
    ) -> None:
        self._optimizer = optimizer
        self._group = group
        self._states = [(frozen, frozen.packed) for _, frozen in states]
        self._thetas = [theta for theta, _ in states]
        learned = states[0][1].tasks > 0
        self._scale = scale if learned else 0.0
        self._pull = pull if learned else 0.0
        limits = [_limits(theta, frozen) for theta, frozen in states]
        self._lows = [low for low, _ in limits]
        self._highs = [high for _, high in limits]
        self.unmovable = [
            (theta, everything)
            for theta, frozen in states
            if bool((everything := frozen.bits == frozen.max_bits).any())
        ]
        if self._scale:
            self._remembers = not _keeps_its_update(optimizer, group)
            self._before = [torch.empty_like(theta) for theta in self._thetas if self._remembers]
            # The share of the update that is taken back: 1 − 2^(−p·bits).
            self._taken_back = [
                1 - torch.exp2(-scale * frozen.bits.to(theta.dtype)) for theta, frozen in states
            ]
        if self._pull:
            self._anchors = [frozen.anchor(theta.dtype) for theta, frozen in states]
            self._rate = -1.0

    @property
    def outdated(self) -> bool:
        """Whether a state was consolidated since."""
        return any(frozen.packed is not packed for frozen, packed in self._states)

    @torch.no_grad()
    def remember(self) -> None:
        """Keeps the values before the step, where the scaled step cannot be told without them."""
        if self._scale and self._remembers:
            torch._foreach_copy_(self._before, self._thetas)

    @torch.no_grad()
    def hold_back(self) -> None:
        """Scales the step, pulls, projects."""
        if self._scale:
            self._scale_back()
        if self._pull:
            torch._foreach_lerp_(self._thetas, self._anchors, self._pulled(float(self._group["lr"])))
        if self._thetas[0].is_cuda:  # where it is kernels that cost, few of them; else few passes over memory
            torch._foreach_maximum_(self._thetas, self._lows)
            torch._foreach_minimum_(self._thetas, self._highs)
        else:
            for theta, low, high in zip(self._thetas, self._lows, self._highs, strict=True):
                theta.clamp_(low, high)

    def _scale_back(self) -> None:
        if self._remembers:
            torch._foreach_lerp_(self._thetas, self._before, self._taken_back)
            return
        moved = [
            (theta, update if update.layout == torch.strided else update.to_dense(), share)
            for theta, share in zip(self._thetas, self._taken_back, strict=True)
            if theta.grad is not None
            for update in [self._optimizer.state.get(theta, {}).get("momentum_buffer", theta.grad)]
        ]
        if moved:
            thetas, updates, shares = (list(part) for part in zip(*moved, strict=True))
            torch._foreach_addcmul_(thetas, updates, shares, float(self._group["lr"]))

    def _pulled(self, rate: float) -> list[Tensor]:
        """The share of the way to the anchor, ηλ(S_t − S_0)/(1 + ηλ(S_t − S_0)), for the current rate η."""
        if rate != self._rate:
            strengths = [
                (frozen.precision - frozen.prior).clamp_(min=0).mul_(rate * self._pull).to(theta.dtype)
                for theta, (frozen, _) in zip(self._thetas, self._states, strict=True)
            ]
            self._shares = [strength / (1 + strength) for strength in strengths]
            self._rate = rate
        return self._shares


def check_strengths(**strengths: float) -> None:
    """Refuses a negative ``scale`` or ``pull``, by name.

    Raises:
        ValueError: If one is negative or NaN.

    Example:
        >>> check_strengths(scale=0.5, pull=0.0)
    """
    for name, value in strengths.items():
        if not value >= 0:
            raise ValueError(f"{name}={value} must not be negative; 0 switches it off")


def _keeps_its_update(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the last update is still at hand after the step: SGD's is −η times its gradient or momentum.

    The values before the step need not be copied then, which is a good part of what a step costs.
    """
    return (
        type(optimizer) is SGD
        and not any(group[other] for other in ("nesterov", "maximize", "fused"))
        and bool(group["momentum"] or not group["weight_decay"])
    )


def _limits(theta: Tensor, frozen: FrozenBits) -> tuple[Tensor, Tensor]:
    if frozen.tasks:
        return frozen.limits(theta.dtype)
    largest = theta.new_tensor(frozen.bound * (1 - 2.0**-frozen.max_bits))
    return -largest.expand_as(theta), largest.expand_as(theta)
