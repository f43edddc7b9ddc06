"""The wrapper stands for the wrapped optimizer: its arguments, attributes, groups and hooks."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_blip.frozen.diagonal import DiagonalState
from lightning_blip.optim.optimizer import FrozenBitsOptimizer


def wrapped(**options):
    theta = nn.Parameter(torch.tensor([0.25, -0.5]))
    state = DiagonalState.of(theta, bound=1.0, prior=1.0)
    return theta, state, FrozenBitsOptimizer(SGD([theta], lr=1.0), {theta: state}, **options)


def test_by_default_steps_are_neither_scaled_nor_pulled():
    _, _, optimizer = wrapped()
    assert (optimizer.scale, optimizer.pull, optimizer.every) == (0.0, 0.0, 1)


@pytest.mark.parametrize("every", [0, -1, float("nan")])
def test_pulls_without_a_positive_number_of_steps_between_them_are_refused(every):
    with pytest.raises(ValueError, match="every="):
        wrapped(every=every)


def test_a_restored_state_must_be_located_before_it_protects_a_parameter():
    theta, state, _ = wrapped()
    restored = DiagonalState.from_state_dict(state.state_dict())
    with pytest.raises(ValueError, match="locate"):
        FrozenBitsOptimizer(SGD([theta], lr=1.0), {theta: restored})


def test_hooks_of_users_see_the_projected_values():
    theta, state, _ = wrapped()
    seen, inner = [], SGD([theta], lr=1.0)
    inner.register_step_post_hook(lambda *_: seen.append(float(theta.detach().abs().max())))
    optimizer = FrozenBitsOptimizer(inner, {theta: state})
    theta.grad = torch.full((2,), 9.0)
    optimizer.step()
    assert seen == [float(theta.detach().abs().max())]
    assert seen[0] < 1


def test_a_group_that_is_added_later_is_stepped_and_protected():
    theta, state, _ = wrapped()
    optimizer = FrozenBitsOptimizer(SGD([nn.Parameter(torch.zeros(1))], lr=1.0), {theta: state})
    optimizer.step()
    optimizer.add_param_group({"params": [theta]})
    theta.grad = torch.full((2,), 9.0)
    optimizer.step()
    assert len(optimizer.param_groups) == 2
    assert (theta < -0.9).all()
    assert (theta > -1).all()


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_what_a_gradient_scaler_sets_is_set_on_the_wrapped_optimizer(name):
    optimizer = wrapped()[2]
    setattr(optimizer, name, 3.0)
    assert getattr(optimizer, name) == getattr(optimizer.optimizer, name) == 3.0
    delattr(optimizer, name)
    assert not hasattr(optimizer.optimizer, name)


def test_gradients_are_removed_by_default_or_set_to_zero():
    theta, _, optimizer = wrapped()
    theta.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=False)
    assert theta.grad.tolist() == [0, 0]
    optimizer.zero_grad()
    assert theta.grad is None


def test_a_wrapper_without_its_optimizer_has_no_attributes():
    """Unpickling asks for attributes before there are any."""
    with pytest.raises(AttributeError, match="optimizer"):
        _ = FrozenBitsOptimizer.__new__(FrozenBitsOptimizer).param_groups


@pytest.mark.parametrize("by_keyword", [False, True])
def test_gradients_that_a_closure_makes_are_masked_too(by_keyword):
    """A value with all bits frozen collects no momentum, however the closure is passed."""
    theta = nn.Parameter(torch.tensor([0.25, -0.5]))
    state = DiagonalState.of(theta, bound=1.0, prior=1.0)
    state.freeze(theta.data, torch.tensor([20, 0]), keep_free_bits=True)
    optimizer = FrozenBitsOptimizer(SGD([theta], lr=0.1), {theta: state}).optimizer

    def closure():
        theta.grad = torch.ones(2)
        return 1.5

    assert (optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)) == 1.5
    assert theta.grad.tolist() == [0.0, 1.0]
