"""The optimizer wrapper that keeps every parameter inside what its frozen bits allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_blip.frozen.diagonal import BITS_MASK, FrozenBits
from lightning_blip.frozen.kronecker import KroneckerBits
from lightning_blip.optim.effective_step import effective_rate, preconditioner
from lightning_blip.optim.step import CHUNK, Step, hold_back_all

Closure = Callable[[], Any]


class FrozenBitsOptimizer(Optimizer):
    """Wraps any ``torch.optim.Optimizer`` so that its steps respect frozen bits.

    Before a step, values with all bits frozen lose their gradient (and, after it, their momentum). After the
    step, for every parameter θ with a frozen state, in this order: the update is scaled by 2^(−p·bits); θ is
    pulled towards its anchor, θ ← θ* + (θ − θ*)/(1 + η·λ·(S_t − S_0)/P); θ is projected into its cell. The
    update that is scaled is the one the optimizer made, so the scale means the same for SGD and Adam, and so
    does the pull: η is the learning rate times what momentum adds up to, and P what the optimizer divides the
    gradient of each value by, see
    :mod:`lightning_blip.optim.effective_step`. The pull is that of ``every`` steps at once, η the sum of
    theirs: it then costs next to nothing, and keeps more, since it leaves less of the noise of single steps.

    A layer in the Kronecker basis is pulled, and projected into its cells, every so many steps as well, P
    being the root mean square over its weight.

    The wrapper shares groups, state and hooks with the wrapped optimizer, and works through the latter's own
    step hooks: schedulers, gradient scalers and loops may hold either of the two. Post-step hooks see
    the projected values.

    Nothing is stored for this beside the frozen state, but for the walls of networks of up to 262,144 values,
    which take 2 MiB at most. Only during a step there is a copy of the values
    before it, where it is scaled and the optimizer is not an SGD, which keeps its update; and a mask of the
    values with all bits frozen, where there are any. Large networks are held back by a function that
    torch.compile makes when it is first needed, which takes some seconds; where it cannot, by the same one
    uncompiled.

    Args:
        optimizer: The optimizer to wrap.
        frozen: The frozen state of each parameter to protect. States may be consolidated between steps.
        scale: p, how strongly frozen bits slow a parameter down; 0 leaves the step as it is.
        pull: λ, how strongly a parameter is drawn to its anchor; 0 does not.
        every: How many steps there are from one pull to the next.
        layers: The frozen state of each layer in the Kronecker basis, by its weight and, if there is one, its
            bias.

    Raises:
        ValueError: If ``scale`` or ``pull`` is negative, ``every`` is not positive, the optimizer is wrapped
            already, or a state was restored and not located yet.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([0.3, -0.6]))
        >>> frozen = FrozenBits.of(theta, bound=1.0, prior=1.0)
        >>> frozen.freeze(theta.data, bits=torch.tensor([2, 0]), keep_free_bits=True)
        >>> optimizer = FrozenBitsOptimizer(torch.optim.SGD([theta], lr=1.0), {theta: frozen})
        >>> theta.grad = torch.tensor([0.25, 0.25])
        >>> optimizer.step()
        >>> theta.data
        tensor([ 0.1667, -0.8500])

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
        every: int = 1,
        layers: Mapping[tuple[Tensor, ...], KroneckerBits] | None = None,
    ) -> None:
        if isinstance(optimizer, FrozenBitsOptimizer):
            raise ValueError(f"optimizer={optimizer!r} is wrapped already: pass its .optimizer instead")
        check_strengths(scale=scale, pull=pull)
        check_every(every)
        if any(state.checksum is not None for state in frozen.values()):
            raise ValueError("frozen holds restored states: call locate(theta) on each of them first")
        self.optimizer = optimizer
        self.frozen = frozen
        self.scale = scale
        self.pull = pull
        self.every = every
        self.layers = layers or {}
        self._protected: list[_Protected] | None = None
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
        self._protected = None

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

    @torch.no_grad()
    def catch_up(self) -> None:
        """Pulls by what is due since the last pull, without a step."""
        steps = [
            self._held_back(one, None, 1.0, self.pull * one.frozen.collected())
            for one in self._protected or []
            if one.tasks and not one.outdated
        ]
        hold_back_all(steps, self.scale)
        for parameters, frozen, group in self._layers_here():
            self._hold_back_layer(parameters, frozen, group, frozen.collected())

    def unwrap(self) -> Optimizer:
        """Takes the freezing off again.

        Returns:
            The wrapped optimizer, as it was before.
        """
        for handle in self._handles:
            handle.remove()
        return self.optimizer

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._protected is None or any(one.outdated for one in self._protected):
            self._protected = [
                _Protected(theta, self.frozen[theta], group)
                for group in optimizer.param_groups
                for theta in group["params"]
                if theta in self.frozen
            ]
            if sum(one.theta.numel() for one in self._protected) <= CHUNK:
                for one in self._protected:
                    one.find_walls()
        for one in self._protected:
            one.remember(self.scale > 0 and not _keeps_its_update(optimizer, one.group))
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
        protected = self._protected or []
        steps, clamped = [], []
        for one in protected:
            if one.tasks:
                step = self._step(one)
                if one.walls is None or step.pull or step.update is not None:
                    steps.append(step)
                else:
                    clamped.append((one.theta.detach(), *one.walls))
        if clamped:
            thetas, low, high = (list(parts) for parts in zip(*clamped, strict=True))
            torch._foreach_maximum_(thetas, low)
            torch._foreach_minimum_(thetas, high)
        hold_back_all(steps, self.scale)
        if self.layers:
            for parameters, frozen, group in self._layers_here():
                rate = frozen.due(effective_rate(group), self.every)
                self._hold_back_layer(parameters, frozen, group, rate)
        for one in protected:
            if not one.tasks:  # only the bound holds it
                one.frozen.due(0.0, self.every)
                largest = one.frozen.bound * (1 - 2.0**-one.frozen.max_bits)
                one.theta.clamp_(-largest, largest)
            one.mask(*self.optimizer.state.get(one.theta, {}).values())
            one.forget()

    def _step(self, one: _Protected) -> Step:
        rate = float(one.group["lr"])
        update, factor = one.update_from_before(), 1.0
        if update is None and self.scale and one.theta.grad is not None:
            update = self.optimizer.state.get(one.theta, {}).get("momentum_buffer", one.theta.grad)
            update, factor = update if update.layout == torch.strided else update.to_dense(), rate
        pull = self.pull * one.frozen.due(effective_rate(one.group), self.every)
        return self._held_back(one, update, factor, pull)

    def _held_back(self, one: _Protected, update: Tensor | None, factor: float, pull: float) -> Step:
        P = preconditioner(self.optimizer, one.theta, one.group) if pull else None
        return Step(one.theta, one.frozen, update, factor, pull, P, seldom=pull > 0 and self.every > 1)

    def _layers_here(self) -> Iterator[tuple[tuple[Tensor, ...], KroneckerBits, dict[str, Any]]]:
        """The layers whose weight this optimizer steps, each with its group."""
        groups = {theta: group for group in self.optimizer.param_groups for theta in group["params"]}
        for parameters, frozen in self.layers.items():
            if parameters[0] in groups:
                yield parameters, frozen, groups[parameters[0]]

    def _hold_back_layer(
        self, parameters: tuple[Tensor, ...], frozen: KroneckerBits, group: dict[str, Any], rate: float
    ) -> None:
        if rate and frozen.tasks:
            P = preconditioner(self.optimizer, parameters[0], group) if self.pull else None
            mean = 1.0 if P is None else float(P.square().mean().sqrt())
            frozen.hold_back(parameters, self.pull * rate / max(mean, 1e-30))

    def _mask_gradients(self) -> None:
        for one in self._protected or ():
            one.mask(one.theta.grad)


class _Protected:
    """A parameter of a group with its frozen state, and what a step needs of it from before."""

    def __init__(self, theta: Tensor, frozen: FrozenBits, group: dict[str, Any]) -> None:
        self.theta = theta
        self.frozen = frozen
        self.group = group
        self.tasks = frozen.tasks
        self.walls: tuple[Tensor, Tensor] | None = None
        self._before: Tensor | None = None
        self._everything: Tensor | None = None
        self._has_unmovable = bool(self._unmovable().any())

    @property
    def outdated(self) -> bool:
        """Whether the state was consolidated since."""
        return self.frozen.tasks != self.tasks

    def find_walls(self) -> None:
        """Keeps the walls of the cells: in small networks it is not memory that counts, but calls."""
        self.walls = self.frozen.limits(self.theta.dtype)

    def remember(self, values: bool) -> None:
        """Finds the values with all bits frozen and, where asked to and of use, keeps all values."""
        if values and self.tasks:
            self._before = self.theta.detach().clone()
        if self._has_unmovable:
            self._everything = self._unmovable()

    def forget(self) -> None:
        """Frees what was remembered for one step."""
        self._before = self._everything = None

    def update_from_before(self) -> Tensor | None:
        """What the step took off the values; only once, since it is worked out in place."""
        return None if self._before is None else self._before.sub_(self.theta)

    def mask(self, *tensors: Any) -> None:
        """Sets to 0 what belongs to values with all bits frozen."""
        if self._everything is None:
            return
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.shape == self.theta.shape:
                if tensor.layout == torch.strided:
                    tensor.masked_fill_(self._everything, 0)
                else:
                    tensor.mul_((~self._everything).to(tensor.dtype))

    def _unmovable(self) -> Tensor:
        return self.frozen.packed & BITS_MASK == self.frozen.max_bits


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


def check_every(every: int) -> None:
    """Refuses a number of steps that is not positive.

    Raises:
        ValueError: If it is not.

    Example:
        >>> check_every(100)
    """
    if not every >= 1:
        raise ValueError(f"every={every} must be a number of steps, at least 1")


def _keeps_its_update(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the last update is still at hand after the step: SGD's is −η times its gradient or momentum.

    The values before the step need not be copied then, which is a good part of what a step costs.
    """
    return (
        type(optimizer) is SGD
        and not any(group[other] for other in ("nesterov", "maximize", "fused"))
        and bool(group["momentum"] or not group["weight_decay"])
    )
