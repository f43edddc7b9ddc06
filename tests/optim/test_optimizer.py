"""FrozenBitsOptimizer steps like the wrapped optimizer, within the cells that frozen bits leave."""

import copy
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_blip.fisher.factors import Factors
from lightning_blip.frozen.diagonal import DiagonalInformation, DiagonalState
from lightning_blip.frozen.kronecker import KroneckerInformation
from lightning_blip.frozen.network import FrozenNetwork
from lightning_blip.optim.optimizer import FrozenBitsOptimizer

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.3),
    "sgd decay": lambda p: SGD(p, lr=0.3, weight_decay=0.1),
    "sgd dampened": lambda p: SGD(p, lr=0.3, momentum=0.9, dampening=0.5),
    "sgd maximize": lambda p: SGD(p, lr=0.3, momentum=0.9, maximize=True),
    "sgd foreach": lambda p: SGD(p, lr=0.3, foreach=True),
    "sgd fused": lambda p: SGD(p, lr=0.3, momentum=0.9, fused=True),
    "sgd momentum decay": lambda p: SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
    "sgd nesterov": lambda p: SGD(p, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: Adam(p, lr=0.1, weight_decay=0.1),
    "adam foreach": lambda p: Adam(p, lr=0.1, foreach=True),
    "adam fused": lambda p: Adam(p, lr=0.1, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.3),
    "adamw fused": lambda p: AdamW(p, lr=0.1, weight_decay=0.3, fused=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.05, momentum=0.5, weight_decay=0.1),
    "rmsprop foreach": lambda p: RMSprop(p, lr=0.05, foreach=True),
    "adagrad": lambda p: Adagrad(p, lr=0.3, weight_decay=0.1),
    "adagrad fused": lambda p: Adagrad(p, lr=0.3, fused=True),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def problem(bits: Tensor | int, cell: str = "strict", gained: float = 0.0):
    """Return a parameter of 24 values in (−1, 1), and its state with the given frozen bits."""
    theta = nn.Parameter(torch.rand(4, 6) * 1.8 - 0.9)
    frozen = DiagonalState.of(theta, bound=1.0, prior=1.0, cell=cell)
    frozen.information = frozen.information + gained
    frozen.freeze(theta.data, torch.as_tensor(bits).expand(4, 6), keep_free_bits=True)
    return theta, frozen


def walk(optimizer: Optimizer, theta: Tensor, steps: int = 25) -> None:
    """Take steps along random gradients."""
    for _ in range(steps):
        theta.grad = torch.randn_like(theta)
        optimizer.step()


@every_optimizer
def test_frozen_codes_never_change_in_the_strict_cell(make):
    bits = torch.randint(0, 21, (4, 6))
    bits[0] = 0
    theta, frozen = problem(bits)
    code = frozen.frozen_code(theta)
    optimizer = FrozenBitsOptimizer(make([theta]), {theta: frozen})
    free = theta[bits == 0].clone()
    for _ in range(25):
        walk(optimizer, theta, steps=1)
        assert torch.equal(frozen.frozen_code(theta), code)
        assert theta.abs().max() < 1
    assert not torch.equal(theta[bits == 0], free)


@given(st.lists(st.integers(0, 20), min_size=24, max_size=24), st.integers(0, 2**31), st.floats(0, 3))
def test_frozen_codes_never_change_for_any_bits_and_steps(bits, seed, scale):
    torch.manual_seed(seed)
    theta, frozen = problem(torch.tensor(bits).view(4, 6), gained=5.0)
    code = frozen.frozen_code(theta)
    walk(FrozenBitsOptimizer(SGD([theta], lr=1.0, momentum=0.9), {theta: frozen}, scale, 1.0), theta, 5)
    assert torch.equal(frozen.frozen_code(theta), code)


@every_optimizer
def test_values_stay_within_the_papers_cell(make):
    bits = torch.randint(1, 20, (4, 6))
    theta, frozen = problem(bits, cell="paper")
    anchor = theta.detach().clone()
    walk(FrozenBitsOptimizer(make([theta]), {theta: frozen}), theta)
    assert ((theta - anchor).abs() <= 2.0**-bits * (1 + 1e-6)).all()
    assert ((theta - anchor).abs() > 0).any()


@every_optimizer
def test_values_with_all_bits_frozen_get_no_gradient_momentum_or_decay(make):
    bits = torch.where(torch.rand(4, 6) < 0.5, 20, 0)
    theta, frozen = problem(bits)
    before = theta.detach().clone()
    optimizer = FrozenBitsOptimizer(make([theta]), {theta: frozen})
    walk(optimizer, theta)
    everything = bits == 20
    assert torch.equal(theta[everything], before[everything])
    assert (theta[~everything] != before[~everything]).all()
    assert (theta.grad[everything] == 0).all()
    values = [value for value in optimizer.state[theta].values() if isinstance(value, Tensor)]
    moments = [value for value in values if value.shape == theta.shape]
    assert moments or (type(optimizer.optimizer) is SGD and not optimizer.param_groups[0]["momentum"])
    for value in moments:
        assert (value[everything] == 0).all()
        assert (value[~everything] != 0).any()


@every_optimizer
def test_before_the_first_task_steps_are_those_of_the_plain_optimizer(make):
    theta = nn.Parameter(torch.rand(4, 6) * 0.1)
    plain = nn.Parameter(theta.detach().clone())
    frozen = DiagonalState.of(theta, bound=1e6, prior=1.0)
    torch.manual_seed(1)
    walk(FrozenBitsOptimizer(make([theta]), {theta: frozen}, scale=2.0, pull=10.0), theta)
    torch.manual_seed(1)
    walk(make([plain]), plain)
    assert torch.equal(theta, plain)


@every_optimizer
def test_scaling_multiplies_the_update_of_every_optimizer(make):
    bits = torch.randint(0, 6, (4, 6))
    theta, frozen = problem(bits, cell="paper")
    free = nn.Parameter(theta.detach().clone())
    anchor = theta.detach().clone()
    wrapped, plain = FrozenBitsOptimizer(make([theta]), {theta: frozen}, scale=1.5), make([free])
    for _ in range(3):
        gradient = torch.randn(4, 6) * 0.01
        before = theta.detach().clone()
        free.data.copy_(before)
        theta.grad, free.grad = gradient.clone(), gradient.clone()
        wrapped.step()
        plain.step()
    expected = before + (free - before) * 2.0 ** (-1.5 * bits)
    inside = ((expected - anchor).abs() < 2.0**-bits) & (expected.abs() < 1)
    assert inside.sum() > 12
    torch.testing.assert_close(theta[inside], expected[inside], rtol=1e-5, atol=1e-6)


def test_scaling_equals_scaling_the_gradient_for_sgd_with_momentum():
    bits = torch.randint(0, 4, (4, 6))
    theta, frozen = problem(bits, cell="paper")
    other = nn.Parameter(theta.detach().clone())
    wrapped = FrozenBitsOptimizer(SGD([theta], lr=0.01, momentum=0.9), {theta: frozen}, scale=2.0)
    plain = SGD([other], lr=0.01, momentum=0.9)
    for _ in range(3):
        gradient = torch.randn(4, 6) * 0.01
        theta.grad, other.grad = gradient.clone(), gradient * 2.0 ** (-2.0 * bits)
        wrapped.step()
        plain.step()
    torch.testing.assert_close(theta, other)


def test_a_parameter_without_a_gradient_is_not_moved():
    theta, frozen = problem(2)
    optimizer = FrozenBitsOptimizer(SGD([theta], lr=0.1, momentum=0.9), {theta: frozen}, scale=1.0)
    walk(optimizer, theta, 2)
    before = theta.detach().clone()
    theta.grad = None
    optimizer.step()
    assert torch.equal(theta.data, before)


def test_sparse_gradients_are_scaled():
    rows = nn.Embedding(4, 6, sparse=True)
    frozen = DiagonalState.of(rows.weight, bound=8.0, prior=1.0)
    frozen.freeze(rows.weight.data, torch.full((4, 6), 1), keep_free_bits=True)
    before = rows.weight.detach().clone()
    optimizer = FrozenBitsOptimizer(SGD(rows.parameters(), lr=0.01), {rows.weight: frozen}, scale=1.0)
    rows(torch.tensor([1, 1])).sum().backward()
    optimizer.step()
    expected = before.clone()
    expected[1] -= 0.01
    low, high = frozen.limits(torch.float32)
    torch.testing.assert_close(rows.weight.data, expected.clamp(low, high))


def test_rows_with_all_bits_frozen_get_no_sparse_gradient():
    rows = nn.Embedding(4, 6, sparse=True)
    frozen = DiagonalState.of(rows.weight, bound=8.0, prior=1.0)
    bits = torch.tensor([0, 20, 0, 20])[:, None].expand(4, 6)
    frozen.freeze(rows.weight.data, bits.contiguous(), keep_free_bits=True)
    before = rows.weight.detach().clone()
    optimizer = FrozenBitsOptimizer(SGD(rows.parameters(), lr=0.01), {rows.weight: frozen})
    rows(torch.tensor([0, 1])).sum().backward()
    optimizer.step()
    assert torch.equal(rows.weight[1:], before[1:])
    torch.testing.assert_close(rows.weight[0], before[0] - 0.01)
    assert not rows.weight.grad.to_dense()[1:].any()


def test_the_pull_is_the_proximal_step_and_follows_the_learning_rate():
    theta, frozen = problem(0, gained=7.0)
    anchor = frozen.anchor(torch.float32)
    inner = SGD([theta], lr=0.01)
    optimizer = FrozenBitsOptimizer(inner, {theta: frozen}, pull=3.0)
    for rate in (0.01, 0.01, 0.1):
        inner.param_groups[0]["lr"] = rate
        before = theta.detach().clone()
        theta.grad = torch.randn_like(theta) * 0.1
        step = before - rate * theta.grad
        optimizer.step()
        torch.testing.assert_close(theta.data, anchor + (step - anchor) / (1 + rate * 3.0 * 7.0))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    "make",
    [
        partial(SGD, lr=0.001),
        partial(SGD, lr=0.0002, momentum=0.9, dampening=0.5),
        partial(Adam, lr=0.0003),
        partial(AdamW, lr=0.0003, weight_decay=0.0, amsgrad=True),
        partial(RMSprop, lr=0.0003),
        partial(Adagrad, lr=0.02),
    ],
)
def test_a_pull_holds_every_optimizer_at_the_same_point(make, every):
    theta, frozen = problem(0, gained=2.0)
    anchor = frozen.anchor(torch.float32)
    low, high = frozen.limits(torch.float32)
    goal = anchor + 0.3 * (torch.minimum(high - anchor, anchor - low))
    optimizer = FrozenBitsOptimizer(make([theta]), {theta: frozen}, pull=3.0, every=every)
    for _ in range(4_000):
        theta.grad = 2.0 * (theta.detach() - goal)
        optimizer.step()
    # At this point the gradients of the loss, 2·(θ − goal), and of the penalty, 3·2·(θ − θ*), cancel.
    torch.testing.assert_close(theta.data, (2.0 * goal + 6.0 * anchor) / 8.0, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("basis", ["diagonal", "kronecker"])
def test_a_boundary_applies_the_pull_that_is_still_due(basis):
    pulled = []
    for every in (2, 3):
        torch.manual_seed(0)
        layer, network = nn.Linear(6, 4), FrozenNetwork(basis)
        network.attach(layer, dict(layer.named_parameters()))
        for name, state in network.states.items():
            parameters = [dict(layer.named_parameters())[one] for one in network.names[name]]
            state.prior = 1e6  # so large that there are no cells
            information = (
                DiagonalInformation(torch.full_like(parameters[0], 7.0))
                if basis == "diagonal"
                else KroneckerInformation(Factors(7.0 * torch.eye(7), torch.eye(4)))
            )
            state.consolidate(parameters, information)
            state.pace.total = 100
        optimizer = FrozenBitsOptimizer(
            Adam(layer.parameters(), lr=0.01), network.by_parameters(layer), pull=300.0, every=every
        )
        for gradient in (0.5, 0.2):
            for theta in layer.parameters():
                theta.grad = torch.full_like(theta, gradient)
            optimizer.step()
        free = layer.weight.detach().clone()
        with torch.no_grad():
            network.settle(layer, pull=300.0)
        pulled.append(layer.weight.detach().clone())
    assert torch.equal(*pulled)
    assert not torch.equal(free, pulled[1])
    with torch.no_grad():
        network.settle(layer, pull=300.0)
    torch.testing.assert_close(layer.weight.data, pulled[1])


def test_the_pull_uses_the_learning_rate_of_a_loaded_state():
    theta, frozen = problem(0, gained=7.0)
    anchor = frozen.anchor(torch.float32)
    optimizer = FrozenBitsOptimizer(SGD([theta], lr=0.01), {theta: frozen}, pull=3.0)
    walk(optimizer, theta, steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.1
    optimizer.load_state_dict(saved)
    before = theta.detach().clone()
    theta.grad = torch.zeros_like(theta)
    optimizer.step()
    torch.testing.assert_close(theta.data, anchor + (before - anchor) / (1 + 0.1 * 3.0 * 7.0))


def test_a_huge_pull_stays_stable_at_the_anchor():
    theta, frozen = problem(0, gained=1e30)
    anchor = frozen.anchor(torch.float32)
    walk(FrozenBitsOptimizer(SGD([theta], lr=1.0), {theta: frozen}, pull=1e3), theta)
    torch.testing.assert_close(theta.data, anchor)


def test_before_the_first_task_values_are_kept_within_the_bound_alone():
    theta = nn.Parameter(torch.zeros(3))
    frozen = DiagonalState.of(theta, bound=0.5, prior=1.0)
    optimizer = FrozenBitsOptimizer(SGD([theta], lr=1.0), {theta: frozen}, scale=2.0, pull=5.0)
    theta.grad = torch.tensor([10.0, -10.0, 0.1])
    optimizer.step()
    torch.testing.assert_close(theta.data, torch.tensor([-0.5, 0.5, -0.1]), atol=1e-6, rtol=0)
    assert (theta.abs() < 0.5).all()


def test_bits_frozen_between_two_steps_hold_from_the_next_step_on():
    theta, frozen = problem(0)
    optimizer = FrozenBitsOptimizer(SGD([theta], lr=0.1), {theta: frozen})
    walk(optimizer, theta, steps=2)
    frozen.freeze(theta.data, torch.full((4, 6), 20), keep_free_bits=True)
    before = theta.detach().clone()
    walk(optimizer, theta, steps=2)
    assert torch.equal(theta.data, before)


def test_frozen_values_stay_after_the_tensor_of_a_parameter_is_replaced():
    theta, frozen = problem(20)
    optimizer = FrozenBitsOptimizer(SGD([theta], lr=0.1), {theta: frozen})
    walk(optimizer, theta, steps=1)
    before = theta.detach().clone()
    theta.data = theta.data.clone()
    walk(optimizer, theta, steps=1)
    assert torch.equal(theta.data, before)


def test_parameters_without_a_state_move_as_with_the_plain_optimizer():
    theta, frozen = problem(20)
    other = nn.Parameter(torch.zeros(2))
    optimizer = FrozenBitsOptimizer(SGD([theta, other], lr=1.0), {theta: frozen})
    other.grad = torch.ones(2)
    optimizer.step()
    assert other.tolist() == [-1.0, -1.0]


class TestTheWrapperCanReplaceTheOptimizer:
    def make(self, bits: int = 2, **arguments):
        theta, frozen = problem(bits)
        inner = SGD([theta], lr=0.1, momentum=0.9, **arguments)
        return theta, inner, FrozenBitsOptimizer(inner, {theta: frozen})

    def test_groups_state_and_defaults_are_those_of_the_wrapped_optimizer(self):
        _, inner, optimizer = self.make()
        assert isinstance(optimizer, Optimizer)
        assert optimizer.param_groups is inner.param_groups
        assert optimizer.state is inner.state
        assert optimizer.defaults is inner.defaults
        assert "SGD" in repr(optimizer)
        with pytest.raises(AttributeError):
            optimizer.no_such_thing  # noqa: B018

    def test_the_state_dict_is_that_of_the_wrapped_optimizer(self):
        theta, inner, optimizer = self.make()
        walk(optimizer, theta, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        assert saved.keys() == inner.state_dict().keys()
        fresh = FrozenBitsOptimizer(SGD([theta], lr=9.0, momentum=0.9), optimizer.frozen)
        fresh.load_state_dict(saved)
        assert fresh.param_groups[0]["lr"] == 0.1
        assert torch.equal(fresh.state[theta]["momentum_buffer"], optimizer.state[theta]["momentum_buffer"])
        SGD([theta], lr=9.0, momentum=0.9).load_state_dict(saved)

    @pytest.mark.parametrize("on_inner", [True, False])
    def test_a_scheduler_may_hold_the_wrapper_or_the_wrapped_optimizer(self, on_inner):
        theta, inner, optimizer = self.make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler = torch.optim.lr_scheduler.StepLR(inner if on_inner else optimizer, 1, gamma=0.5)
            code = optimizer.frozen[theta].frozen_code(theta)
            for expected in (0.1, 0.05, 0.025):
                assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
                walk(optimizer, theta, 1)
                scheduler.step()
            assert torch.equal(optimizer.frozen[theta].frozen_code(theta), code)

    def test_a_one_cycle_schedule_changes_the_momentum(self):
        theta, inner, optimizer = self.make()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        walk(optimizer, theta, 1)
        scheduler.step()
        assert inner.param_groups[0]["momentum"] != 0.9

    @pytest.mark.parametrize("call", ["positional", "keyword"])
    def test_a_closure_is_called_once_and_its_gradient_is_masked(self, call):
        theta, _, optimizer = self.make(bits=20)
        calls = []

        def closure():
            optimizer.zero_grad()
            loss = (theta**2).sum()
            loss.backward()
            calls.append(loss)
            return loss

        with torch.enable_grad():
            result = optimizer.step(closure) if call == "positional" else optimizer.step(closure=closure)
        assert len(calls) == 1
        assert result is calls[0]
        assert (theta.grad == 0).all()

    def test_lbfgs_may_call_its_closure_several_times(self):
        theta, frozen = problem(3)
        optimizer = FrozenBitsOptimizer(torch.optim.LBFGS([theta], max_iter=5), {theta: frozen})
        code = frozen.frozen_code(theta)

        def closure():
            optimizer.zero_grad()
            loss = ((theta - 0.7) ** 2).sum()
            loss.backward()
            return loss

        before = closure().item()
        optimizer.step(closure)
        assert closure().item() < before
        assert torch.equal(frozen.frozen_code(theta), code)

    def test_the_hooks_of_a_user_are_called_once_and_see_projected_values(self):
        theta, inner, optimizer = self.make(bits=20)
        seen = []
        inner.register_step_post_hook(lambda *_: seen.append(("earlier", theta.detach().clone())))
        wrapped = FrozenBitsOptimizer(optimizer.unwrap(), optimizer.frozen)
        wrapped.register_step_pre_hook(lambda *_: seen.append(("pre", theta.detach().clone())))
        wrapped.register_step_post_hook(lambda *_: seen.append(("post", theta.detach().clone())))
        before = theta.detach().clone()
        walk(wrapped, theta, 1)
        assert sorted(name for name, _ in seen) == ["earlier", "post", "pre"]
        assert all(torch.equal(value, before) for _, value in seen)

    def test_stepping_the_wrapped_optimizer_itself_respects_frozen_bits(self):
        theta, inner, _ = self.make(bits=20)
        before = theta.detach().clone()
        walk(inner, theta, 2)
        assert torch.equal(theta.data, before)

    def test_after_unwrap_the_optimizer_moves_all_values_again(self):
        theta, inner, optimizer = self.make(bits=20)
        assert optimizer.unwrap() is inner
        before = theta.detach().clone()
        walk(inner, theta, 1)
        assert (theta != before).all()

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_zero_grad_sets_gradients_to_none_or_0(self, set_to_none):
        theta, _, optimizer = self.make()
        theta.grad = torch.ones(4, 6)
        optimizer.zero_grad(set_to_none=set_to_none)
        assert (theta.grad is None) is set_to_none
        assert set_to_none or not theta.grad.any()

    def test_parameters_of_a_group_added_later_are_protected(self):
        theta, _, optimizer = self.make(bits=20)
        late, frozen = problem(20)
        optimizer = FrozenBitsOptimizer(optimizer.unwrap(), {**optimizer.frozen, late: frozen})
        walk(optimizer, theta, 1)
        optimizer.add_param_group({"params": [late], "lr": 1.0})
        before = late.detach().clone()
        walk(optimizer, late, 1)
        assert torch.equal(late.data, before)

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("infinite", [False, True])
    def test_a_gradient_scaler_divides_gradients_and_leaves_out_infinite_ones(self, fused, infinite):
        theta, frozen = problem(0)
        optimizer = FrozenBitsOptimizer(SGD([theta], lr=0.1, fused=fused), {theta: frozen})
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = theta.detach().clone()
        scaler.scale((theta * (float("inf") if infinite else 0.5)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        expected = before if infinite else before - 0.05
        torch.testing.assert_close(theta.data, expected, atol=1e-5, rtol=0)
        if infinite:
            assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("argument", ["scale", "pull"])
def test_a_negative_strength_is_refused_by_name(argument):
    theta, frozen = problem(0)
    with pytest.raises(ValueError, match=rf"{argument}=-1 must not be negative"):
        FrozenBitsOptimizer(SGD([theta], lr=0.1), {theta: frozen}, **{argument: -1})


def test_wrapping_a_wrapped_optimizer_is_refused():
    theta, frozen = problem(0)
    optimizer = FrozenBitsOptimizer(SGD([theta], lr=0.1), {theta: frozen})
    with pytest.raises(ValueError, match="wrapped already"):
        FrozenBitsOptimizer(optimizer, {theta: frozen})
