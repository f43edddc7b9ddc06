"""GPM: the outputs for old inputs do not change, and the memory is as small as possible."""

from copy import deepcopy
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_blip import TaskHeads, TaskSequenceDataModule
from lightning_blip.baselines import GPM
from lightning_blip.baselines.gpm import grow_basis, layer_inputs
from tests.helpers.fitting import fit
from tests.helpers.learning import learn
from tests.helpers.networks import Net, pairs


class ConvNet(Net):
    """A network of two convolutions, one of them without a bias, and a head."""

    def __init__(self, heads):
        super().__init__(optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv2d(8, 6, 2, bias=False),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = TaskHeads(24, classes=[2] * heads) if heads else nn.Linear(24, 6)


def images():
    y = torch.arange(48) % 6
    x = torch.randn(6, 4, 6, 6)[y] + 0.3 * torch.randn(48, 4, 6, 6)
    return TaskSequenceDataModule.split_classes(
        TensorDataset(x, y), TensorDataset(x, y), classes_per_task=2, epochs_per_task=4, batch_size=8
    )


class Boundary(pl.Callback):
    """Copies the network after the first task, and two of the task's samples."""

    def on_task_end(self, trainer, pl_module, task):
        if task.index == 0:
            self.x = next(iter(trainer.datamodule.train_dataloader()))[0][:2]
            self.network = deepcopy(nn.Sequential(pl_module.body, pl_module.head)).eval()


@pytest.mark.parametrize("heads", [0, 3], ids=["shared head", "head per task"])
def test_the_outputs_for_old_inputs_do_not_change(heads, tmp_path):
    moved = []
    for method in ([GPM(threshold=1.0, first_threshold=1.0, samples=2)], []):
        boundary = Boundary()
        module = learn(*method, boundary, net=partial(ConvNet, heads), stream=images(), folder=tmp_path)
        x, y, old, new = boundary.x, boundary.x, boundary.network, nn.Sequential(module.body, module.head)
        new.eval()
        if heads:
            old, new = (nn.Sequential(net[0], net[1].heads[0]) for net in (old, new))
        layers = zip([*old[0], old[1]], [*new[0], new[1]], strict=True)
        changes = []
        for before, after in layers:
            x, y = before(x), after(y)
            if isinstance(before, (nn.Linear, nn.Conv2d)) and not (heads and before is old[1]):
                assert not torch.equal(before.weight, after.weight)
                changes.append(float((y - x).abs().max() / x.abs().max()))
        moved.append(changes)
    ours, theirs = moved
    assert max(ours) < 1e-4
    assert min(theirs) > 0.02


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 7),
        nn.Linear(5, 7, bias=False),
        nn.Conv2d(2, 30, 3, stride=2, padding=1),
        nn.Conv2d(2, 30, (2, 3), padding=(0, 2), dilation=(1, 2), bias=False),
    ],
    ids=repr,
)
def test_inputs_are_what_a_layer_multiplies_by_its_weights(layer):
    x = torch.randn(20, 5) if isinstance(layer, nn.Linear) else torch.randn(20, 2, 6, 7)
    module = nn.Sequential(layer, nn.Dropout(0.5))
    batches = [(part, None) for part in x.split(6)]
    R = layer_inputs(module, {"0": layer}, batches, samples=15)["0"].float()
    weights = torch.cat([theta.detach().reshape(len(theta), -1) for theta in layer.parameters()], 1)
    outputs = layer(x[:15]).detach().transpose(0, 1).flatten(1)
    if isinstance(layer, nn.Linear):
        outputs = layer(x[:15]).detach().T
    torch.testing.assert_close(weights @ R @ R.T @ weights.T, outputs @ outputs.T, rtol=1e-4, atol=1e-3)
    assert module.training
    assert not layer._forward_pre_hooks
    assert torch.is_grad_enabled()


def test_gradients_of_linear_maps_lose_their_part_in_the_memory(tmp_path):
    gpm = GPM(threshold=0.7, first_threshold=0.7)
    module = learn(gpm, folder=tmp_path, max_epochs=2)
    x, y = torch.randn(3, 16, 8)[:2]
    G = gradients_of(module, x, y)
    gpm.on_task_start(None, module, pairs().tasks[1])
    gradients_of(module, x, y)
    gpm.on_before_optimizer_step(None, module, None)
    for name, M in gpm.state_dict()["memory"].items():
        layer = module.get_submodule(name)
        whole = torch.cat([G[f"{name}.weight"], G[f"{name}.bias"][:, None]], 1)
        left = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        assert 0 < M.shape[1] < len(M)
        torch.testing.assert_close(left, whole - whole @ M @ M.T)


def gradients_of(module, x, y):
    """Return the gradients of a loss of two forward passes, by name."""
    module.zero_grad()
    (module(x).square().sum() + module(y).square().sum()).backward()
    return {name: theta.grad.clone() for name, theta in module.named_parameters()}


def held(M, R):
    """Return the share of the squared norm of R in the space of M."""
    return float((M.T @ R).square().sum() / R.square().sum())


def test_the_basis_grows_by_as_few_directions_as_needed():
    scales = torch.logspace(0, -2, 20, dtype=torch.float64)[:, None]
    M = torch.zeros(20, 0, dtype=torch.float64)
    for _ in range(3):
        R = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q @ (scales * torch.randn(20, 50))
        before, M = M, grow_basis(M, R, threshold=0.9)
        assert torch.equal(M[:, : before.shape[1]], before)
        torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1], dtype=torch.float64))
        assert held(M, R) >= 0.9
        assert held(M[:, :-1], R) < 0.9
        # By Eckart and Young, no basis with one direction less holds as much.
        rest = R - before @ before.T @ R
        leading = torch.linalg.eigh(rest @ rest.T).eigenvectors.flip(1)
        fewer = torch.cat([before, leading[:, : M.shape[1] - before.shape[1] - 1]], 1)
        assert held(fewer, R) < 0.9
        assert torch.equal(grow_basis(M, R, threshold=0.9), M)


def test_a_basis_of_all_directions_holds_everything():
    R = torch.randn(9, 4, dtype=torch.float64) @ torch.randn(4, 30, dtype=torch.float64)
    M = grow_basis(torch.zeros(9, 0, dtype=torch.float64), R, threshold=1.0)
    assert M.shape == (9, 4)
    assert torch.equal(grow_basis(M, 3 * R, threshold=1.0), M)


def test_first_threshold_is_the_threshold_of_the_first_layer_only(tmp_path):
    sizes = []
    for first_threshold in (0.5, 0.999):
        gpm = GPM(threshold=0.9, first_threshold=first_threshold)
        learn(gpm, folder=tmp_path, max_epochs=2)
        sizes.append({name: M.shape[1] for name, M in gpm.state_dict()["memory"].items()})
    assert sizes[0]["body.0"] < sizes[1]["body.0"]
    assert sizes[0]["head"] == sizes[1]["head"]


class Padded(Net):
    """A network without a layer to project: each shares or freezes a parameter, or cannot be unfolded."""

    def __init__(self):
        super().__init__(heads=3)
        tied = nn.Linear(8, 8)
        frozen = nn.Linear(8, 16)
        frozen.bias.requires_grad_(False)
        self.body = nn.Sequential(tied, nn.Linear(8, 8), frozen)
        self.body[1].weight = tied.weight
        self.conv = nn.Sequential(
            nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(1, 1, 3, padding="same"),
            nn.Conv2d(2, 2, 3, groups=2),
        )


def test_a_network_without_a_layer_to_project_is_refused():
    with pytest.raises(ValueError, match="GPM finds no layer in Padded whose gradient it can project"):
        fit(GPM(), Padded())


def test_an_optimizer_that_scales_each_parameter_brings_a_warning():
    with pytest.warns(UserWarning, match="GPM projects gradients, and Adam scales the step"):
        fit(GPM(), Net(optimizer=torch.optim.Adam), max_epochs=1)
