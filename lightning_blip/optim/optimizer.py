"""The optimizer wrapper that keeps every parameter within what its frozen bits allow."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_blip.frozen.base import FrozenState, Step, Stepper
from lightning_blip.frozen.network import hold_back_each
from lightning_blip.optim.effective_step import effective_rate, preconditioner

Closure = Callable[[], Any]


class FrozenBitsOptimizer(Optimizer):
    """Wraps any ``torch.optim.Optimizer`` so that its steps respect frozen bits.

    Before a step, values with all bits frozen lose their gradient (and, after it, their momentum). After the
    step, for every parameter θ with a frozen state, in this order: the update is scaled by 2^(−p·bits); θ is
    pulled towards its anchor, θ ← θ* + (θ − θ*)/(1 + η·λ·(S_t − S_0)/P); θ is projected into its cell. The
    scale multiplies the update that the optimizer made, so it means the same for SGD and Adam, and so does
    the pull: η is the learning rate times the sum of the momentum's weights, and P the value that the
    optimizer divides each gradient by, see :mod:`lightning_blip.optim.effective_step`. One pull makes up for
    up to ``every`` steps, η being the sum of theirs: this costs next to nothing, and remembers more, because
    it keeps less of the noise of single steps.

    A layer in the Kronecker basis is projected into its cells at each pull; there P is the root mean square
    over its weight.

    The wrapper has the groups, state and hooks of the wrapped optimizer, and works through that optimizer's
    own step hooks: schedulers, gradient scalers and loops may hold either of the two. Post-step hooks see the
    projected values.

    Nothing is stored beside the frozen state but the walls of networks of up to 262,144 values, 2 MiB at
    most. During a step there is a copy of the values before it where it is scaled and the optimizer is not an
    SGD, and a mask of the values with all bits frozen, where there are any. Large networks are held back by a
    function that ``torch.compile`` makes at the first step, which takes some seconds; where it cannot, by
    the same function uncompiled.

    Args:
        optimizer: The optimizer to wrap.
        frozen: The frozen state of each parameter to protect, or of the parameters that share a state. States
            may be consolidated between steps.
        scale: p, how strongly frozen bits slow a parameter down; 0 leaves the step as it is.
        pull: λ, how strongly a parameter is pulled towards its anchor; 0 does not. A function is called at
            each step, where λ is chosen later.
        every: The largest number of steps from one pull to the next.

    Raises:
        ValueError: If ``scale`` or ``pull`` is negative, ``every`` is not positive, the optimizer is wrapped
            already, or a state was restored and not located yet.

    Example:
        >>> from lightning_blip.frozen.diagonal import DiagonalState
        >>> theta = torch.nn.Parameter(torch.tensor([0.3, -0.6]))
        >>> state = DiagonalState.of(theta, bound=1.0, prior=1.0)
        >>> state.freeze(theta.data, bits=torch.tensor([2, 0]), keep_free_bits=True)
        >>> optimizer = FrozenBitsOptimizer(torch.optim.SGD([theta], lr=1.0), {theta: state})
        >>> theta.grad = torch.tensor([0.25, 0.25])
        >>> optimizer.step()
        >>> theta.data
        tensor([ 0.1667, -0.8500])

    Source:
        BLIP (Shi et al., CVPR 2021), section 3.3, for the projection. The pull is the proximal step of the
        quadratic penalty of EWC (Kirkpatrick et al., PNAS 2017).
    """

    # Optimizer.__init__ would make groups, state and hooks of its own, and run every global hook twice. They
    # have one owner, the wrapped optimizer, also after it has loaded a state: __getattr__ finds them there.
    def __init__(
        self,
        optimizer: Optimizer,
        frozen: Mapping[Any, FrozenState],
        scale: float = 0.0,
        pull: float | Callable[[], float] = 0.0,
        every: int = 1,
    ) -> None:
        if isinstance(optimizer, FrozenBitsOptimizer):
            raise ValueError(f"optimizer={optimizer!r} is wrapped already: pass its .optimizer instead")
        check_strengths(scale=scale, **({} if callable(pull) else {"pull": pull}))
        check_every(every)
        if not all(state.is_located for state in frozen.values()):
            raise ValueError("frozen holds restored states: call locate([theta]) on each of them first")
        self.optimizer = optimizer
        self.frozen = frozen
        self.scale = scale
        self.every = every
        self._pull = pull
        self._guards: list[_Guard] | None = None
        self._steppers: dict[type[FrozenState], Stepper] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _run_first(optimizer, self._handles[1].id)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def pull(self) -> float:
        """λ."""
        return self._pull() if callable(self._pull) else self._pull

    def step(self, closure: Closure | None = None) -> Any:
        """Take one step of the wrapped optimizer, within what the frozen bits allow.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the wrapped optimizer returns.
        """
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state: a checkpoint is the same with the wrapper and without."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)
        self._guards = None

    def __repr__(self) -> str:
        return f"FrozenBitsOptimizer({self.optimizer!r}, scale={self.scale}, pull={self.pull})"

    # A fused optimizer reads these two from itself, a gradient scaler sets them on the optimizer it is given.
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
        """Remove the hooks.

        Returns:
            The wrapped optimizer, as it was before.
        """
        for handle in self._handles:
            handle.remove()
        return self.optimizer

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._guards is None:
            self._guards = self._make_guards()
        for guard in self._guards:
            guard.prepare(self.scale > 0 and not _keeps_its_update(optimizer, guard.group))
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
        rates = [effective_rate(group) for group in optimizer.param_groups]
        pull, steps = self.pull, dict[type[FrozenState], list[Step]]()
        for guard in self._guards or []:
            step = guard.step(self.scale, pull, rates[guard.group_index], self.every)
            steps.setdefault(type(guard.state), []).append(step)
        for kind in steps.keys() - self._steppers.keys():
            self._steppers[kind] = kind.stepper()
        hold_back_each(steps, self._steppers, self.scale)
        for guard in self._guards or []:
            if guard.masks:
                guard.mask(*optimizer.state.get(guard.parameters[0], {}).values())
            guard.forget()

    def _make_guards(self) -> list[_Guard]:
        """Return a guard for every state whose first parameter this optimizer steps."""
        groups = {
            theta: index
            for index, group in enumerate(self.optimizer.param_groups)
            for theta in group["params"]
        }
        guards = []
        for key, state in self.frozen.items():
            parameters = key if isinstance(key, tuple) else (key,)
            if parameters[0] in groups:
                guards.append(_Guard(self.optimizer, parameters, state, groups[parameters[0]]))
                state.divisor = weakref.WeakMethod(guards[-1].divisor)
        return guards

    def _mask_gradients(self) -> None:
        for guard in self._guards or ():
            guard.mask(guard.parameters[0].grad)


class _Guard:
    """One state with its parameters and their group, and what a step needs from before it."""

    def __init__(
        self, optimizer: Optimizer, parameters: tuple[Tensor, ...], state: FrozenState, group: int
    ) -> None:
        self._optimizer = optimizer
        self.group_index = group
        self.parameters = parameters
        self.state = state
        self._tasks = -1
        self._has_immovable = False
        self._before: Tensor | None = None
        self._immovable: Tensor | None = None

    @property
    def group(self) -> dict[str, Any]:
        """The parameters' group; an optimizer makes new ones when it loads a state."""
        group: dict[str, Any] = self._optimizer.param_groups[self.group_index]
        return group

    def divisor(self) -> Tensor | None:
        """Return P of the first parameter; None where it is 1."""
        return preconditioner(self._optimizer, self.parameters[0], self.group)

    def prepare(self, keep_values: bool) -> None:
        """Find the values with all bits frozen and, where asked, keep a copy of all values."""
        if self._tasks != self.state.tasks:  # consolidated since the last step
            self._tasks, self._has_immovable = self.state.tasks, self.state.immovable() is not None
        if keep_values and self.state.tasks:
            self._before = self.parameters[0].detach().clone()
        if self._has_immovable:
            self._immovable = self.state.immovable()

    @property
    def masks(self) -> bool:
        """Whether there are values with all bits frozen."""
        return self._immovable is not None

    def step(self, scale: float, pull: float, rate: float, every: int) -> Step:
        """Return the step that the optimizer has taken, with the pull that is due.

        Args:
            scale: p.
            pull: λ.
            rate: The effective learning rate of the group.
            every: The largest number of steps from one pull to the next.
        """
        theta, factor = self.parameters[0], 1.0
        update = None if self._before is None else self._before.sub_(theta)
        if update is None and scale and theta.grad is not None and self.state.tasks:
            update = self._optimizer.state.get(theta, {}).get("momentum_buffer", theta.grad)
            update, factor = (
                update if update.layout == torch.strided else update.to_dense(),
                float(self.group["lr"]),
            )
        due = self.state.pace.due(rate, every)
        divisor = self.divisor() if pull * due and self.state.tasks else None
        seldom = pull * due > 0 and every > 1
        return Step(self.parameters, self.state, pull, due, divisor, update, factor, seldom)

    def forget(self) -> None:
        """Free what was kept for one step."""
        self._before = self._immovable = None

    def mask(self, *tensors: Any) -> None:
        """Set to 0 what belongs to values with all bits frozen."""
        if self._immovable is None:
            return
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.shape == self._immovable.shape:
                if tensor.layout == torch.strided:
                    tensor.masked_fill_(self._immovable, 0)
                else:
                    tensor.mul_((~self._immovable).to(tensor.dtype))


def check_strengths(**strengths: float) -> None:
    """Raise an error for a negative ``scale``, ``pull`` or ``damping``, by name.

    Raises:
        ValueError: If one is negative or NaN.

    Example:
        >>> check_strengths(scale=0.5, pull=0.0)
    """
    for name, value in strengths.items():
        if not value >= 0:
            raise ValueError(f"{name}={value} must not be negative; 0 switches it off")


def check_every(every: int) -> None:
    """Raise an error for a number of steps that is not positive.

    Raises:
        ValueError: If it is not.

    Example:
        >>> check_every(100)
    """
    if not every >= 1:
        raise ValueError(f"every={every} must be a number of steps, at least 1")


def _run_first(optimizer: Optimizer, hook: int) -> None:
    """Run a post-step hook before all others, so that users' hooks see the projected values.

    Public functions register a hook last; the order is that of a private dictionary (torch 2.0 and later).
    """
    optimizer._optimizer_step_post_hooks.move_to_end(hook, last=False)  # type: ignore[attr-defined]


def _keeps_its_update(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Return whether the last update can be read after the step: SGD's is −η times gradient or momentum.

    The values before the step need not be copied then, which is a large part of what a step costs.
    """
    return (
        type(optimizer) is SGD
        and not any(group[other] for other in ("nesterov", "maximize", "fused"))
        and bool(group["momentum"] or not group["weight_decay"])
    )
