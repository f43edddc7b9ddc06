"""The frozen states of a whole network: who holds which parameter, prior, pull at a boundary, saving."""

import gc

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from lightning_blip.fisher.factors import Factors
from lightning_blip.frozen.base import Freezing
from lightning_blip.frozen.diagonal import DiagonalInformation, DiagonalState
from lightning_blip.frozen.kronecker import KroneckerInformation, KroneckerState
from lightning_blip.frozen.network import BASES, FrozenNetwork, LayerSize, layer_sizes
from lightning_blip.optim.optimizer import FrozenBitsOptimizer

NAMES = pytest.mark.parametrize("basis", ["diagonal", "kronecker"])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.Linear(9, 2))


def attached(module, basis="diagonal", fan="in"):
    frozen = FrozenNetwork(basis, fan)
    frozen.attach(module, dict(module.named_parameters()))
    return frozen


def learned(module, frozen, of_parameter=7.0):
    """Give every state the information of one task."""
    information = {}
    for name, state in frozen.states.items():
        if isinstance(state, DiagonalState):
            information[name] = DiagonalInformation(torch.full(state.shape, of_parameter))
        else:
            out, inputs = state.shape
            information[name] = KroneckerInformation(
                Factors(of_parameter * torch.eye(inputs), torch.eye(out))
            )
    return frozen.consolidate(module, information)


def test_only_the_diagonal_basis_ignores_correlations():
    assert {name: basis.ignores_correlations for name, basis in BASES.items()} == {
        "diagonal": True,
        "kronecker": False,
    }


def test_the_size_of_a_layer_is_its_inputs_or_its_larger_side():
    sizes = layer_sizes(network())
    assert sizes["0.weight"] == LayerSize(4, False)
    assert sizes["2.bias"] == LayerSize(9, True)
    assert sizes.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert [layer_sizes(network(), "max")[name].fan for name in ("0.weight", "2.bias")] == [9, 9]
    assert layer_sizes(nn.Linear(4, 8))["bias"] == LayerSize(4, True)
    assert layer_sizes(nn.Conv2d(3, 2, 5))["weight"].fan == 75
    assert LayerSize() == (None, False)


@NAMES
def test_bounds_follow_the_layer_that_a_parameter_belongs_to(basis):
    """6/√fan for a weight, 1 for a bias, a power of two for anything else."""
    frozen = attached(network(), basis)
    assert frozen.state_of("0.weight").bound == 3.0
    assert frozen.state_of("2.weight").bound == 2.0
    assert frozen.state_of("0.bias").bound == (1.0 if basis == "diagonal" else 3.0)
    assert frozen.state_of("1.weight").bound == 2.0


def test_a_large_bias_widens_the_bound_of_its_layer_in_the_kronecker_basis():
    """Weight and bias share one state, so its bound holds both."""
    module = network()
    module[0].bias.data[1] = 5.0
    assert attached(module, "kronecker").state_of("0.weight").bound == 16.0


def test_in_the_kronecker_basis_layers_share_a_state_and_the_rest_is_diagonal():
    frozen = attached(network(), "kronecker")
    assert frozen.names == {
        "0.weight": ("0.weight", "0.bias"),
        "2.weight": ("2.weight", "2.bias"),
        "1.weight": ("1.weight",),
        "1.bias": ("1.bias",),
    }
    assert isinstance(frozen.state_of("0.bias"), KroneckerState)
    assert frozen.state_of("0.bias") is frozen.states["0.weight"]
    assert isinstance(frozen.state_of("1.bias"), DiagonalState)
    with pytest.raises((KeyError, StopIteration, RuntimeError)):
        frozen.state_of("unknown")


@NAMES
def test_the_prior_of_a_state_is_the_priors_value_times_the_fan_until_a_task_informs_it(basis):
    module = network()
    frozen = attached(module, basis)
    frozen.set_prior(module, 0.5)
    priors = {"0.weight": 2.0, "2.weight": 4.5, "1.weight": 0.5}
    assert {name: frozen.states[name].prior for name in priors} == priors
    frozen.set_prior(module, 1e3)
    assert frozen.states["0.weight"].prior == 4e3
    learned(module, frozen, of_parameter=0.0)  # a task without information
    frozen.set_prior(module, 2.0)
    assert frozen.states["0.weight"].prior == 8.0
    learned(module, frozen, of_parameter=7.0)
    frozen.set_prior(module, 3.0)
    assert frozen.states["0.weight"].prior == 8.0
    assert {
        name: one.precision.unique().numel() for name, one in frozen.states.items()
    }.keys() == frozen.precision().keys()


def test_the_prior_goes_with_the_fan_that_was_asked_for():
    module = network()
    assert attached(module, fan="max").units(module) == {
        "0.weight": 9, "0.bias": 9, "1.weight": 1, "1.bias": 1, "2.weight": 9, "2.bias": 9,
    }  # fmt: skip


@pytest.mark.parametrize("rate", [0.1, 0.02])
@pytest.mark.parametrize("pull", [4.0, 0.0])
@NAMES
def test_a_pull_that_is_due_is_applied_once_when_the_network_is_settled(basis, pull, rate):
    """θ ← θ* + (θ − θ*)/(1 + η·λ·(S − S_0)), where all coordinates have the information 7."""
    module = nn.Linear(4, 3)
    frozen = attached(module, basis)
    for state in frozen.states.values():
        state.prior = 1e3  # no cells in the way
    learned(module, frozen)
    state, start = frozen.states["weight"], module.weight.detach().clone()
    anchor = state.anchor(torch.float32) if basis == "diagonal" else state.anchor[:, :-1]
    for state in frozen.states.values():
        state.pace.total = 1000
    optimizer = FrozenBitsOptimizer(
        SGD(module.parameters(), lr=rate), frozen.by_parameters(module), pull=pull, every=3
    )
    for _ in range(2):
        for theta in module.parameters():
            theta.grad = torch.full_like(theta, 0.5)
        optimizer.step()
    torch.testing.assert_close(module.weight.data, start - rate)
    assert not frozen.just_pulled
    expected = anchor + (start - rate - anchor) / (1 + 2 * rate * pull * 7.0)
    for _ in range(2):  # the second time nothing is due any more
        with torch.no_grad():
            frozen.settle(module, pull)
        torch.testing.assert_close(module.weight.data, expected, rtol=0, atol=2e-4)
        assert frozen.just_pulled


@NAMES
def test_without_the_optimizer_that_took_the_steps_nothing_is_pulled(basis):
    """Its preconditioner is not known any more. Walls hold all the same."""
    module = nn.Linear(4, 3)
    frozen = attached(module, basis)
    for state in frozen.states.values():
        state.prior = 1e6
    learned(module, frozen)
    for state in frozen.states.values():
        state.pace.total = 1000
    optimizer = FrozenBitsOptimizer(
        Adam(module.parameters(), lr=0.1), frozen.by_parameters(module), pull=4.0, every=3
    )
    for theta in module.parameters():
        theta.grad = torch.ones_like(theta)
    optimizer.step()
    optimizer.unwrap()
    del optimizer
    gc.collect()
    before = module.weight.detach().clone()
    with torch.no_grad():
        frozen.settle(module, 4.0)
    torch.testing.assert_close(module.weight.data, before, rtol=0, atol=1e-5)


@NAMES
def test_settled_values_lie_in_their_cells(basis):
    module = nn.Linear(4, 3)
    frozen = attached(module, basis)
    frozen.set_prior(module, 1e-6)
    learned(module, frozen)
    anchor = module.weight.detach().clone()
    module.weight.data += 0.5
    assert frozen.drifted(module) == 12
    assert frozen.strain(module).at_walls >= 12
    with torch.no_grad():
        frozen.settle(module, 0.0)
    assert (module.weight - anchor).abs().max() < 0.01
    assert frozen.drifted(module) == 0


def test_only_a_network_whose_every_state_was_pulled_was_just_pulled():
    module = network()
    frozen = attached(module)
    assert frozen.just_pulled
    frozen.states["0.weight"].pace.steps = 1
    assert not frozen.just_pulled


@NAMES
def test_capacity_is_the_share_of_all_bits(basis):
    module = nn.Linear(4, 3)
    frozen = attached(module, basis)
    assert (frozen.values, frozen.used_capacity) == (15, 0.0)
    for state in frozen.states.values():
        state.prior = 1.0
    learned(module, frozen, of_parameter=15.0)
    assert all((bits == 2).all() for bits in frozen.bits().values())
    assert frozen.used_capacity == pytest.approx(2 / 20)
    assert FrozenNetwork().used_capacity == 0.0
    one_bit = FrozenNetwork(freezing=Freezing(max_bits=1))
    single = nn.Linear(1, 1, bias=False)
    one_bit.attach(single, dict(single.named_parameters()))
    learned(single, one_bit, of_parameter=15.0)
    assert one_bit.used_capacity == 1.0


@NAMES
def test_a_state_is_measured_only_while_all_its_parameters_are_trained(basis):
    module = network()
    frozen = attached(module, basis)
    module[0].bias.requires_grad_(False)
    measured = set(frozen.observe(module).collectors)
    assert ("0.weight" in measured) == (basis == "diagonal")
    assert {"2.weight", "1.bias"} <= measured


def test_damping_is_for_the_matrices_of_layers_alone():
    module = network()
    frozen = attached(module)
    fishers = {name: torch.ones_like(theta) for name, theta in module.named_parameters()}
    damped = {
        name: float(one.damped(0.5).coordinates().amax())
        for name, one in frozen.observe(module).information(fishers).items()
    }
    assert damped["0.weight"] == damped["0.bias"] == 1.5
    assert damped["1.weight"] == 1.0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 9), nn.Identity(), nn.Linear(9, 2)),
            "'1.weight', which the module does not",
        ),
        (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), r"\(8, \d\) here, and \(9, \d\)"),
    ],
)
@NAMES
def test_another_network_is_refused_by_the_first_difference(basis, other, message):
    frozen = attached(network(), basis)
    with pytest.raises(ValueError, match=message):
        frozen.attach(other, {})


@NAMES
def test_attaching_again_keeps_what_is_known_and_adds_what_is_new(basis):
    module = network()
    frozen = FrozenNetwork(basis)
    frozen.attach(module, {"1.weight": module[1].weight})
    known = frozen.states["1.weight"]
    frozen.attach(module, dict(module.named_parameters()))
    assert frozen.states["1.weight"] is known
    assert {one for names in frozen.names.values() for one in names} == {
        n for n, _ in module.named_parameters()
    }
    assert all(state.prior == 1.0 for state in frozen.states.values())


@NAMES
def test_states_follow_the_network_to_its_device(basis):
    module = nn.Linear(4, 3)
    frozen = FrozenNetwork(basis)
    frozen.attach(module, dict(module.named_parameters()))
    frozen.attach(module.to("meta"), {})
    state = frozen.states["weight"]
    assert (state.packed if basis == "diagonal" else state.anchor).device.type == "meta"


@NAMES
def test_a_saved_network_comes_back_with_the_weights_of_the_checkpoint(basis):
    module = network()
    frozen = attached(module, basis)
    frozen.set_prior(module, 1e-3)
    learned(module, frozen)
    saved = frozen.state_dict()
    again = FrozenNetwork(basis)
    again.load_state_dict(saved)
    assert again.names == frozen.names
    assert {name: type(one) for name, one in again.states.items()} == {
        name: type(one) for name, one in frozen.states.items()
    }
    again.attach(module, dict(module.named_parameters()))
    for name, bits in frozen.bits().items():
        assert torch.equal(again.bits()[name], bits)
    saved["1.bias"]["state"]["prior"] = -1.0
    with pytest.raises(ValueError, match=r"Parameter '1\.bias': prior=-1\.0"):
        again.load_state_dict(saved)


def test_strain_adds_up_over_the_states():
    module = nn.Linear(4, 3)
    frozen = attached(module)
    frozen.set_prior(module, 0.5)
    learned(module, frozen, of_parameter=1.0)
    anchors = {name: state.anchor(torch.float32) for name, state in frozen.states.items()}
    module.weight.data += 0.1
    module.bias.data -= 0.2
    costs = [0.5 * (theta - anchors[name]).square().sum() for name, theta in module.named_parameters()]
    assert frozen.strain(module).forgetting == pytest.approx(float(sum(costs)), rel=1e-2)


def test_the_gradients_of_a_batch_reach_the_collector_of_their_state():
    seen = []

    class Note:
        def see(self, parameter, gradients):
            seen.append((parameter, gradients))

        def finish(self, samples):
            return [torch.tensor(float(samples))]

    collectors = attached(nn.Linear(4, 3), "kronecker").observe(nn.Linear(4, 3))
    collectors.collectors = {"weight": Note()}
    collectors.__post_init__()
    collectors.see("weight", "first")
    collectors.see("bias", "second")
    collectors.end_batch(5)
    collectors.end_batch(3)
    assert seen == [("weight", "first"), ("bias", "second")]
    assert collectors.finish() == [torch.tensor(8.0)]
