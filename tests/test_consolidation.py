"""One boundary of BLIP: the due pull is applied, information is measured and averaged, bits are frozen."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import lightning_blip.consolidation as module
from lightning_blip import BLIP
from lightning_blip.fisher import diagonal_fisher
from lightning_blip.trainer import processes

BASES = ["diagonal", "kronecker"]


def batches(count=2, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def train(network, optimizer, steps):
    x, y = batches(1, seed=1)[0]
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()


def anchors(blip, network):
    """The weight and bias at the last boundary."""
    if blip.basis == "diagonal":
        return [blip.state(name).anchor(torch.float32) for name in ("weight", "bias")]
    matrix = blip.state("weight").anchor
    return [matrix[:, :-1], matrix[:, -1]]


def pulled(blip, network, optimizer, strength):
    """Return the weights after a pull: ω/(1 + η·λ·(S − S_0)/P) in the coordinates of the basis."""
    weights = [network.weight.detach(), network.bias.detach()]
    P = [1.0, 1.0]
    if isinstance(optimizer, Adam):
        states = [optimizer.state[theta] for theta in (network.weight, network.bias)]
        P = [(one["exp_avg_sq"] / (1 - 0.999 ** float(one["step"]))).sqrt() + 1e-8 for one in states]
    deltas = [theta - anchor for theta, anchor in zip(weights, anchors(blip, network), strict=True)]
    if blip.basis == "diagonal":
        information = [blip.state(name).prior * blip.state(name).information for name in ("weight", "bias")]
        deltas = [
            delta / (1 + strength * one / divisor)
            for delta, one, divisor in zip(deltas, information, P, strict=True)
        ]
    else:
        state = blip.state("weight")
        divisor = float(torch.as_tensor(P[0]).square().mean().sqrt())
        delta = torch.cat([deltas[0], deltas[1][:, None]], dim=1)
        omega = state.output_basis.T @ delta @ state.input_basis
        delta = (
            state.output_basis @ (omega / (1 + strength * state.information / divisor)) @ state.input_basis.T
        )
        deltas = [delta[:, :-1], delta[:, -1]]
    return [anchor + delta for anchor, delta in zip(anchors(blip, network), deltas, strict=True)]


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("make", [SGD, Adam])
def test_a_boundary_first_applies_the_pull_that_is_due(basis, make):
    """The weights that are consolidated are those after all pulls, also of steps since the last one."""
    network, blip = nn.Linear(5, 3), BLIP(prior=10.0, pull=20.0, damping=0.0, basis=basis, every=100)
    blip.consolidate(network, batches())
    optimizer = make(network.parameters(), lr=0.05)
    wrapped = blip.wrap(optimizer, network)
    train(network, wrapped, steps=46)
    rate = blip.state("weight").pace.rate
    assert rate == pytest.approx(0.05 * blip.state("weight").pace.steps)
    assert rate > 0  # a pull is due
    expected = pulled(blip, network, optimizer, 20.0 * rate)
    before = network.weight.detach().clone()
    blip.consolidate(network, batches(seed=1))
    torch.testing.assert_close(network.weight.data, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(network.bias.data, expected[1], rtol=0, atol=1e-5)
    assert (network.weight - before).abs().max() > 1e-3
    assert blip.state("weight").pace.rate == 0


@pytest.mark.parametrize("basis", BASES)
def test_without_steps_since_the_last_pull_a_boundary_moves_no_weight(basis):
    """The pull is for steps that an optimizer took: weights that were set by hand stay."""
    network, blip = nn.Linear(5, 3), BLIP(prior=10.0, pull=20.0, damping=0.0, basis=basis)
    blip.consolidate(network, batches())
    network.weight.data += 0.25
    before = network.weight.detach().clone()
    blip.consolidate(network, batches())
    torch.testing.assert_close(network.weight.data, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("basis", BASES)
def test_a_boundary_puts_weights_back_into_their_cells(basis):
    network, blip = nn.Linear(5, 3), BLIP(prior=1e-8, pull=0.0, damping=0.0, basis=basis)
    blip.consolidate(network, batches())
    anchor = network.weight.detach().clone()
    network.weight.data[0] += 0.5
    report = blip.consolidate(network, batches())
    assert report["blip/drifted_share"] > 0.2
    assert report["blip/at_wall_share"] > 0.2
    assert (network.weight - anchor)[0].abs().max() < 0.4


def test_shares_of_a_boundary_are_of_all_values():
    network, blip = nn.Linear(5, 3), BLIP(prior=1e-6, damping=0.0)
    first = blip.consolidate(network, batches())
    bits = torch.cat([one.flatten() for one in blip.bits().values()])
    assert first["blip/newly_frozen_share"] == pytest.approx(float((bits > 0).float().mean()))
    assert first["blip/at_wall_share"] == first["blip/drifted_share"] == 0
    network.weight.data[0, :2] = -2.0  # out of two cells
    second = blip.consolidate(network, batches())
    after = torch.cat([one.flatten() for one in blip.bits().values()])
    assert second["blip/at_wall_share"] == pytest.approx(2 / 18)
    assert second["blip/drifted_share"] == pytest.approx(2 / 18)
    assert second["blip/newly_frozen_share"] == pytest.approx(float((after > bits).float().mean()))
    assert 0 < second["blip/newly_frozen_share"] < 1


def test_a_boundary_says_how_long_it_took():
    report = BLIP().consolidate(nn.Linear(5, 3), batches())
    assert 0 < report["blip/seconds"] < 60


def test_the_gain_of_a_layer_is_the_sum_over_its_parameters():
    network, blip = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), BLIP(prior=1e-4, damping=0.0)
    report = blip.consolidate(network, batches())
    for layer, fan in (("0", 5), ("1", 4)):
        gain = sum(
            float(0.5 * torch.log2(blip.precision()[f"{layer}.{name}"] / (1e-4 * fan)).sum())
            for name in ("weight", "bias")
        )
        assert report[f"blip/information_gain/{layer}"] == pytest.approx(gain, rel=1e-5)


@pytest.mark.parametrize("basis", BASES)
def test_a_layer_that_is_trained_no_more_keeps_its_bits_and_gains_nothing(basis):
    network, blip = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), BLIP(prior=1e-4, basis=basis)
    blip.consolidate(network, batches())
    before = blip.bits()["0.weight"]
    network[0].requires_grad_(False)
    report = blip.consolidate(network, batches())
    assert torch.equal(blip.bits()["0.weight"], before)
    assert report["blip/information_gain/0"] == 0
    assert report["blip/information_gain/1"] > 0
    network.requires_grad_(False)
    assert blip.consolidate(network, batches())["blip/information_gain"] == 0
    assert blip.tasks_learned == 3


def test_with_too_little_memory_a_batch_is_measured_in_parts(monkeypatch):
    """The information is the same, and a warning says why it takes longer."""
    tried, cleared = [], []

    def small_memory(*args, parts, **options):
        tried.append(parts)
        if parts == 1:
            raise MemoryError("no memory")
        return diagonal_fisher(*args, parts=parts, **options)

    monkeypatch.setattr(module, "diagonal_fisher", small_memory)
    monkeypatch.setattr(module, "garbage_collection_cuda", lambda: cleared.append(True))
    network, blip, plain = nn.Linear(5, 3), BLIP(labels="empirical"), BLIP(labels="empirical")
    with pytest.warns(UserWarning, match="Not enough memory"):
        blip.consolidate(network, batches())
    assert tried[0] == 1
    assert len(tried) == 2
    assert tried[1] > 1
    assert cleared
    monkeypatch.undo()
    plain.consolidate(network, batches())
    for name, S in plain.precision().items():
        torch.testing.assert_close(blip.precision()[name], S, rtol=1e-2, atol=0)


def test_an_error_that_is_not_of_memory_is_raised_at_once(monkeypatch):
    tried = []

    def broken(*args, **options):
        tried.append(options)
        raise RuntimeError("mat1 and mat2 do not fit")

    monkeypatch.setattr(module, "diagonal_fisher", broken)
    blip = BLIP()
    with pytest.raises(RuntimeError, match="do not fit"):
        blip.consolidate(nn.Linear(5, 3), batches())
    assert len(tried) == 1
    assert blip.tasks_learned == 0


def test_every_process_measures_its_share_and_the_means_are_averaged(monkeypatch):
    """With three processes each one takes a third of the samples, and all estimates are averaged."""
    seen, averaged = [], []

    def note(*args, samples, shard, **options):
        seen.append((samples, shard))
        return diagonal_fisher(*args, samples=samples, **options)

    monkeypatch.setattr(module, "diagonal_fisher", note)
    monkeypatch.setattr(processes, "rank_and_world_size", lambda: (1, 3))
    monkeypatch.setattr(processes, "share_buffers", lambda module: None)
    monkeypatch.setattr(processes, "average", lambda value: averaged.append(value) or value)
    monkeypatch.setattr(processes, "gathered", lambda value: [value] * 3)
    network = nn.Linear(5, 3)
    BLIP(samples=100).consolidate(network, batches())
    assert seen == [(34, (1, 3))]
    assert [tuple(one.shape) for one in averaged] == [(3, 5), (3,)]
    averaged.clear()
    BLIP(samples=100, basis="kronecker").consolidate(network, batches())
    assert [tuple(one.shape) for one in averaged] == [(3, 5), (3,), (6, 6), (3, 3)]


def test_the_norm_of_the_information_is_the_mean_of_the_processes_that_know_it(monkeypatch):
    """A process whose batches were too small to tell is left out of the mean."""
    network, chosen = nn.Linear(5, 3), []
    monkeypatch.setattr(module, "choose_pull", lambda norm, diagonal: chosen.append(norm) or 1.0)
    BLIP().consolidate(network, batches())
    monkeypatch.setattr(processes, "gathered", lambda value: [value, None, 2 * value])
    BLIP().consolidate(network, batches())
    assert chosen[1] == pytest.approx(1.5 * chosen[0])


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(
    ("given", "measures"), [({}, True), ({"pull": 1.0}, True), ({"pull": 1.0, "damping": 0.0}, False)]
)
def test_overlaps_are_measured_only_to_choose_a_strength_in_the_diagonal_basis(
    basis, given, measures, monkeypatch
):
    """Overlaps take time and memory. The Kronecker basis meets correlations and needs none."""
    observers = []

    def note(*args, **options):
        observers.append(options["observers"])
        return diagonal_fisher(*args, **options)

    monkeypatch.setattr(module, "diagonal_fisher", note)
    network, blip = nn.Linear(5, 3), BLIP(basis=basis, **given)
    blip.consolidate(network, batches())
    blip.consolidate(network, batches())
    assert len(observers[0]) == (2 if measures and basis == "diagonal" else 1)
    assert len(observers[1]) == 1  # after the first boundary everything is chosen


def test_labels_are_drawn_anew_at_each_boundary_and_alike_in_each_run():
    """The seed of the sampled labels is the number of tasks learned."""
    network, network_again = nn.Linear(5, 3), nn.Linear(5, 3)
    network_again.load_state_dict(network.state_dict())
    first, again = BLIP(prior=1e-4, damping=0.0), BLIP(prior=1e-4, damping=0.0)
    first.consolidate(network, batches())
    again.consolidate(network_again, batches())
    one = first.precision()["weight"]
    assert torch.equal(one, again.precision()["weight"])
    first.consolidate(network, batches())
    assert not torch.allclose(first.precision()["weight"] - one, one - 5e-4, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("terminal", "quiet", "shown"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_progress_bar_is_shown_only_on_a_terminal(terminal, quiet, shown, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **options):
            bars.append(options)
            self.counted = 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            bars.append(self.counted)

        def update(self, samples):
            self.counted += samples

    monkeypatch.setattr(module, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    network, blip = nn.Linear(5, 3), BLIP(samples=20, labels="empirical")
    blip._memory.consolidate(network, module.TaskBatches(batches()), quiet)
    assert bars[0]["disable"] is not shown
    assert bars[0]["total"] == 20
    assert bars[1] == 20


def test_in_the_kronecker_basis_newly_frozen_coordinates_are_counted_by_their_eigenvalues():
    """With a rank the number of coordinates grows from none: all with bits are new at the first boundary."""
    network, blip = nn.Linear(5, 3), BLIP(prior=1e-6, damping=0.0, basis="kronecker", rank=2)
    report = blip.consolidate(network, batches())
    bits = blip.bits()["weight"]
    assert bits.shape == (2, 2)
    assert report["blip/newly_frozen_share"] == pytest.approx(int((bits > 0).sum()) / 18)
    assert report["blip/newly_frozen_share"] > 0
    network.requires_grad_(False)
    assert blip.consolidate(network, batches())["blip/newly_frozen_share"] == 0


@pytest.mark.parametrize("basis", BASES)
def test_information_that_is_not_finite_is_refused_by_the_parameters_name(basis):
    """The gradient of a square root at 0 is infinite, although the loss is finite."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(5, 3), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.layer(x) + self.scale.sqrt()

    network, blip = Root(), BLIP(basis=basis)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(FloatingPointError, match="'scale' is not finite"):
        blip.consolidate(network, batches())
    assert blip.tasks_learned == 0
    assert blip.used_capacity == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
