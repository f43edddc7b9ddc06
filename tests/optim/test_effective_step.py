"""How far an optimizer moves a parameter along a constant gradient, measured against the formula."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, RMSprop

from lightning_blip.optim.effective_step import effective_rate, preconditioner


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.8, "dampening": 0.5}, {"momentum": 0.5, "nesterov": True}],
)
def test_along_a_constant_gradient_steps_become_the_effective_rate(options):
    theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SGD([theta], lr=0.1, **options)
    for _ in range(200):
        theta.grad = torch.ones_like(theta)
        before = theta.detach().clone()
        optimizer.step()
    step = float((before - theta.detach())[0])
    assert step == pytest.approx(effective_rate(optimizer.param_groups[0]), rel=1e-6)


def test_dampening_counts_only_together_with_momentum():
    assert effective_rate({"lr": 0.5, "momentum": 0.0, "dampening": 0.25}) == 0.5
    assert effective_rate({"lr": 0.5}) == 0.5
    assert effective_rate({"lr": 0.5, "momentum": 0.75}) == 2.0


def test_a_momentum_that_never_ends_counts_as_a_thousand_steps():
    assert effective_rate({"lr": 0.5, "momentum": 1.0}) == pytest.approx(500.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Adam(p, lr=1e-4, betas=(0.0, 0.9), eps=0.3),
        lambda p: Adam(p, lr=1e-4, betas=(0.0, 0.9), amsgrad=True),
        lambda p: RMSprop(p, lr=1e-4, alpha=0.9, eps=0.3),
        lambda p: Adagrad(p, lr=1e-4, eps=0.3),
    ],
    ids=["adam", "amsgrad", "rmsprop", "adagrad"],
)
def test_a_step_is_the_rate_times_the_gradient_over_the_preconditioner(make):
    theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = make([theta])
    for scale in (3.0, 0.5, 1.5):
        theta.grad = scale * torch.tensor([1.0, -0.1, 4.0], dtype=torch.float64)
        before = theta.detach().clone()
        optimizer.step()
    P = preconditioner(optimizer, theta, optimizer.param_groups[0])
    torch.testing.assert_close(before - theta.detach(), 1e-4 * theta.grad / P, rtol=1e-6, atol=0)


def test_amsgrad_divides_by_the_largest_squares_seen():
    theta = nn.Parameter(torch.zeros(1))
    optimizer = Adam([theta], lr=0.1, betas=(0.9, 0.0001), amsgrad=True)
    for gradient in (10.0, 0.001):
        theta.grad = torch.tensor([gradient])
        optimizer.step()
    assert float(preconditioner(optimizer, theta, optimizer.param_groups[0])) == pytest.approx(10.0, rel=1e-2)


def test_nothing_divides_gradients_without_squares_of_the_parameters_shape():
    theta = nn.Parameter(torch.zeros(2, 3))
    optimizer = SGD([theta], lr=0.1)
    assert preconditioner(optimizer, theta, optimizer.param_groups[0]) is None
    for squares in (torch.ones(2), 1.0):  # Adafactor keeps rows and columns alone
        optimizer.state[theta] = {"exp_avg_sq": squares, "step": 1}
        assert preconditioner(optimizer, theta, {"betas": (0.9, 0.999)}) is None
    optimizer.state[theta] = {"sum": torch.full((2, 3), 4.0)}
    assert torch.equal(preconditioner(optimizer, theta, {}), torch.full((2, 3), 2.0))
