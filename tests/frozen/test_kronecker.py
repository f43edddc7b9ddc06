"""A layer in its Kronecker eigenbasis: factors, precisions, cells and the pull."""

import copy

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_blip import BLIP
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.fisher.factors import Factors, matrix_layers
from lightning_blip.frozen.kronecker import KroneckerInformation, KroneckerState, as_matrix
from lightning_blip.frozen.network import FrozenNetwork
from tests.helpers.fitting import fit
from tests.helpers.networks import Net, blobs, pairs


def per_sample(network, x):
    """Return the gradients of every sample by parameter name, with the labels that diagonal_fisher draws."""
    drawn = []

    class Keep:
        def see(self, name, gradients):
            drawn.append((name, gradients.rows(slice(None))))

        def end_batch(self, size):
            pass

    diagonal_fisher(network, [(x, None)], observers=[Keep()])
    return dict(drawn)


def test_the_factors_of_a_linear_layer_are_the_means_of_outer_products():
    torch.manual_seed(0)
    network, x = nn.Linear(3, 4).double(), torch.randn(50, 3).double()
    frozen = FrozenNetwork("kronecker")
    frozen.attach(network, dict(network.named_parameters()))
    collectors = frozen.observe(network)
    diagonal_fisher(network, [(x[:20], None), (x[20:], None)], observers=[collectors])
    factors = Factors(*collectors.finish())
    inputs = torch.cat([x, torch.ones(50, 1)], dim=1)
    g = per_sample(network, x)["bias"]
    torch.testing.assert_close(factors.A, inputs.T @ inputs / 50)
    torch.testing.assert_close(factors.G, g.T @ g / 50)


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)),
    ],
)
def test_the_product_of_the_factors_has_the_trace_of_the_fisher_information(network):
    torch.manual_seed(0)
    network, x = network.double(), torch.randn(40, 6).double()
    layers = matrix_layers(network, dict(network.named_parameters()))
    frozen = FrozenNetwork("kronecker")
    frozen.attach(network, dict(network.named_parameters()))
    collectors = frozen.observe(network)
    fisher = diagonal_fisher(network, [(x, None)], observers=[collectors])
    collectors.finish()
    information = collectors.information(fisher)
    assert information.keys() == layers.keys()
    assert len(layers) == 2
    for weight, one in information.items():
        trace = fisher[weight].sum() + fisher[layers[weight]].sum()
        calibrated = one.factors
        product = torch.kron(calibrated.G, calibrated.A)
        torch.testing.assert_close(product.trace(), trace)
        torch.testing.assert_close(calibrated.A.trace(), calibrated.G.trace())


def test_only_matrices_of_one_group_with_a_weight_of_their_own_count_as_layers():
    network = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "headless": nn.Linear(4, 4, bias=False),
            "grouped": nn.Conv1d(4, 4, 1, groups=2),
            "patches": nn.Conv2d(1, 2, 3),
            "table": nn.Embedding(4, 4),
            "tied": nn.Linear(4, 4),
            "untracked": nn.Linear(4, 4),
        }
    )
    network["tied"].weight = network["table"].weight
    names = {name for name, _ in network.named_parameters() if not name.startswith("untracked")}
    assert matrix_layers(network, names - {"patches.bias"}) == {
        "plain.weight": "plain.bias",
        "headless.weight": None,
        "patches.weight": None,
    }


def state(prior=1e-3, tasks=2, size=(5, 7), rank=None, seed=0):
    """Return a weight, its state after random tasks, its Fisher matrix and the last information gain."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(size, generator=generator).double() * 0.1
    frozen = KroneckerState.of(theta, bound=1.0, prior=prior, rank=rank)
    sums = [torch.zeros(n, n).double() for n in size]
    for _ in range(tasks):
        G, A = ((x.T @ x / 9) for x in (torch.randn(9, n, generator=generator).double() for n in size))
        gain = frozen.consolidate([theta], KroneckerInformation(Factors(A, G)))
        for total, factor in zip(sums, (G, A), strict=True):
            total += factor
    return theta, frozen, torch.kron(*sums) / tasks, gain


def test_precisions_in_the_eigenbasis_follow_the_formula():
    _, frozen, F, _ = state()
    basis = torch.kron(frozen.output_basis, frozen.input_basis)
    torch.testing.assert_close((basis * frozen.information.flatten()) @ basis.T, F)
    torch.testing.assert_close(basis.T @ basis, torch.eye(35).double())
    expected = (0.5 * torch.log2(frozen.precision / 1e-3) + 0.5).floor().clamp(0, 20)
    assert torch.equal(frozen.bits, expected.to(torch.uint8))


def test_the_pull_is_the_proximal_step_of_the_whole_quadratic_penalty():
    theta, frozen, F, _ = state(prior=1e9)  # so large that there are no cells
    moved = theta + 0.3
    held = frozen.held_back(moved, strength=2.0)
    # argmin over x of |x - moved|²/2 + 2·(x - θ*)ᵀF(x - θ*)/2
    expected = torch.linalg.solve(torch.eye(35).double() + 2.0 * F, (moved - theta).flatten())
    torch.testing.assert_close(held - theta, expected.view(5, 7))


def test_every_coordinate_is_put_back_into_its_cell():
    theta, frozen, _, _ = state(prior=1e-6)
    held = frozen.held_back(theta + torch.randn(5, 7).double() * 10, strength=0.0)
    omega = frozen.output_basis.T @ (held - theta) @ frozen.input_basis
    assert (frozen.bits > 3).any()
    assert (omega.abs() <= frozen.width * (1 + 1e-6)).all()
    assert (omega.abs() > frozen.width * (1 - 1e-6)).sum() > 5
    torch.testing.assert_close(frozen.held_back(held, strength=0.0), held)


def large_layer():
    """Return a state of 60 by 80 whose eigenvalues fall as fast as those of large layers, and a step."""
    generator = torch.Generator().manual_seed(0)
    G, A = (
        torch.linalg.qr(torch.randn(n, n, generator=generator))[0] * torch.logspace(1, -9, n)
        for n in (60, 80)
    )
    theta = torch.zeros(60, 80)
    frozen = KroneckerState.of(theta, bound=1.0, prior=1e-3)
    frozen.consolidate([theta], KroneckerInformation(Factors(A @ A.T, G @ G.T)))
    return frozen, torch.randn(60, 80, generator=generator)


@pytest.mark.parametrize("pull", [0.0, 1e-4, 2.0, 1e6])
def test_leaving_out_directions_with_hardly_any_information_changes_the_step_by_rounding_only(pull):
    frozen, step = large_layer()
    omega = frozen.output_basis.T @ step @ frozen.input_basis
    width = torch.where(frozen.bits > 0, 0.5 ** frozen.bits.float(), torch.inf)
    held = (omega / (1 + pull * frozen.information)).clamp(-width, width)
    expected = frozen.output_basis @ held @ frozen.input_basis.T
    torch.testing.assert_close(frozen.held_back(step, pull), expected, atol=3e-6, rtol=0)
    assert 0 < (frozen.bits > 0).float().mean() < 0.5


def test_directions_with_hardly_any_information_take_no_products():
    frozen, step = large_layer()
    with FlopCounterMode(display=False) as counter:
        frozen.held_back(step, strength=0.1)
    assert 0 < counter.get_total_flops() < 0.5 * 2 * (2 * 60 * 80 * (60 + 80))


def test_the_predicted_forgetting_is_the_quadratic_form_of_the_mean_fisher_matrix():
    theta, frozen, F, _ = state()
    step = torch.randn(5, 7).double()
    expected = 0.5 * step.flatten() @ F @ step.flatten() / 2
    assert frozen.strain([theta + step]).forgetting == pytest.approx(float(expected))
    assert frozen.strain([theta]).forgetting == 0


def test_the_gain_compares_the_precisions_before_and_after_a_task_in_the_new_basis():
    _, first, _, gain = state(tasks=1)
    torch.testing.assert_close(gain, 0.5 * torch.log2(first.precision / 1e-3))
    theta, frozen, _, _ = state(tasks=2)
    after = copy.deepcopy(frozen)
    nothing = Factors(torch.zeros(7, 7), torch.zeros(5, 5))
    gain = after.consolidate([theta], KroneckerInformation(nothing))
    # The information is a mean over tasks, and the new task has none.
    torch.testing.assert_close(after.information, frozen.information * 2 / 3)
    torch.testing.assert_close(
        gain, 0.5 * torch.log2((1e-3 + frozen.information * 2 / 3) / (1e-3 + frozen.information))
    )


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_directions_that_a_rank_leaves_out_share_their_mean_eigenvalue(rank):
    theta, frozen, _, _ = state(prior=1e9, rank=rank)

    def factor(basis, values, rest):
        return rest * torch.eye(len(basis)).double() + basis * (values - rest) @ basis.T

    G = factor(frozen.output_basis, frozen.output_values, frozen.output_rest)
    A = factor(frozen.input_basis, frozen.input_values, frozen.input_rest)
    whole = state(prior=1e9)[1]
    one_task, of_all = state(tasks=1, rank=rank)[1], state(tasks=1)[1]
    assert one_task.input_rest == pytest.approx(float(of_all.input_values[rank:].mean()))
    assert float(A.trace()) == pytest.approx(float(whole.input_values.sum()))
    F = torch.kron(G, A) / 2
    step = torch.randn(5, 7).double()
    expected = torch.linalg.solve(torch.eye(35).double() + 2.0 * F, step.flatten()).view(5, 7)
    torch.testing.assert_close(frozen.held_back(theta + step, strength=2.0) - theta, expected)
    expected = float(step.flatten() @ F @ step.flatten() / 4)
    assert frozen.strain([theta + step]).forgetting == pytest.approx(expected)


def test_a_rank_keeps_the_directions_with_most_information_in_constant_memory():
    def numbers(one):
        """Return how many numbers a state stores."""
        return sum(value.numel() for value in vars(one).values() if isinstance(value, torch.Tensor))

    _, whole, F, _ = state(tasks=5)
    _, low, _, _ = state(tasks=5, rank=3)
    assert numbers(low) == 35 + 3 * (5 + 7) + 6 == numbers(state(tasks=9, rank=3)[1])
    assert numbers(whole) == 35 + 25 + 49 + 12
    best = torch.linalg.eigvalsh(F).sort(descending=True).values[:9].sum()
    assert 0.8 * best < low.information.sum() < best


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_fit_resumed_after_any_epoch_ends_like_a_fit_without_a_break(tmp_path, stop):
    def parts():
        torch.manual_seed(1)
        return Net(norm=True), BLIP(basis="kronecker", every=3), pairs(seed=7)

    whole, blip, tasks = parts()
    fit(blip, whole, tasks)
    module, first, tasks = parts()
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit([first, checkpoint], module, tasks, enable_checkpointing=True, max_epochs=stop)
    module, second, tasks = parts()
    fit(second, module, tasks, ckpt_path=tmp_path / f"epoch={stop - 1}.ckpt")
    assert blip.tasks_learned == second.tasks_learned == 3
    for name, value in whole.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert second.chosen == blip.chosen
    for name, bits in blip.bits().items():
        assert torch.equal(second.bits()[name], bits)


def test_parameters_of_other_layers_are_measured_in_the_diagonal_basis():
    blip = BLIP(basis="kronecker")
    network = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 6))
    blip.consolidate(network, DataLoader(blobs(), batch_size=30))
    assert {name: tuple(bits.shape) for name, bits in blip.bits().items()} == {
        "0.weight": (4, 9),
        "2.weight": (6, 5),
        "1.weight": (4,),
        "1.bias": (4,),
    }


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_pulled_as_a_matrix_that_acts_on_patches(channels_last):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    x, y = torch.randn(40, 3, 4, 4), torch.randint(2, (40,))
    blip = BLIP(basis="kronecker", prior=1e9, pull=20.0, damping=0.0, every=1)
    blip.consolidate(network, [(x, y)])
    assert blip.bits()["0.weight"].shape == (4, 28)
    optimizer = blip.wrap(torch.optim.SGD(network.parameters(), lr=0.1), network)
    layer, convolution = blip.state("0.weight"), network[0]
    nn.functional.cross_entropy(network(x), y).backward()
    stepped = as_matrix([theta - 0.1 * theta.grad for theta in (convolution.weight, convolution.bias)])
    expected = layer.held_back(stepped, strength=20.0 * 0.1)
    optimizer.step()
    torch.testing.assert_close(as_matrix([convolution.weight, convolution.bias]), expected)
    assert (expected - stepped).abs().max() > 1e-4
    assert blip.predicted_forgetting(network) > 0


def test_a_weight_that_is_not_used_as_a_matrix_is_refused_by_name():
    class Odd(nn.Linear):
        def forward(self, x):
            return torch.einsum("bi,oi->bo", x, self.weight.square()) + self.bias

    blip = BLIP(basis="kronecker")
    with pytest.raises(ValueError, match="The layer of 'weight' has no Kronecker factors"):
        blip.consolidate(Odd(8, 6), DataLoader(blobs(), batch_size=30))


def test_a_layer_that_forward_does_not_use_has_no_frozen_bits():
    class Partial(nn.Linear):
        def __init__(self):
            super().__init__(8, 6)
            self.spare = nn.Linear(3, 3)

    network, blip = Partial(), BLIP(prior=1e-6, basis="kronecker")
    blip.consolidate(network, DataLoader(blobs(), batch_size=30))
    assert not blip.bits()["spare.weight"].any()
    assert blip.bits()["weight"].any()
    assert blip.predicted_forgetting(network) == 0


def test_one_pull_makes_up_for_all_steps_since_the_last_one():
    torch.manual_seed(0)
    network = nn.Linear(8, 6)
    blip = BLIP(basis="kronecker", every=3, prior=1e6, pull=5.0, damping=0.0)
    blip.consolidate(network, DataLoader(blobs(), batch_size=30))
    optimizer = blip.wrap(torch.optim.SGD(network.parameters(), lr=0.1), network)
    layer = blip.state("weight")
    plain = copy.deepcopy(network)
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    x, y = blobs().tensors
    layer.pace.total = 60  # soon after a boundary there are fewer steps between pulls
    for step in range(1, 4):
        for net, one in ((network, optimizer), (plain, other)):
            one.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            one.step()
        both = [as_matrix([net.weight, net.bias]) for net in (network, plain)]
        if step < 3:
            assert torch.equal(*both)
    torch.testing.assert_close(both[0], layer.held_back(both[1], strength=5.0 * 0.3))
    assert not torch.equal(*both)
