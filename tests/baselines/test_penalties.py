"""EWC, SI and MAS: importances and penalties agree with slow versions."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_blip.baselines import EWC, MAS, SI
from lightning_blip.baselines.mas import sensitivity
from lightning_blip.fisher import diagonal_fisher
from tests.helpers.learning import added_gradients, disturb, learn, learn_by_hand
from tests.helpers.networks import Net, pairs


class Boundaries(pl.Callback):
    """Collects the Fisher information and the parameters at every boundary."""

    def __init__(self):
        self.fishers, self.parameters = [], []

    def on_task_end(self, trainer, pl_module, task):
        generator = torch.Generator().manual_seed(task.index)
        batches = trainer.datamodule.train_dataloader()
        self.fishers.append(diagonal_fisher(pl_module, batches, samples=30, generator=generator))
        self.parameters.append({name: x.detach().clone() for name, x in pl_module.named_parameters()})


def test_ewc_adds_the_gradient_of_its_penalty(tmp_path):
    ewc, boundaries = EWC(strength=7.0, samples=30), Boundaries()
    module = learn(ewc, boundaries, folder=tmp_path)
    disturb(module)
    parameters = dict(module.named_parameters())
    penalty = sum(
        7.0 / 2 * (fisher[name] * (theta - boundaries.parameters[-1][name]) ** 2).sum()
        for fisher in boundaries.fishers
        for name, theta in parameters.items()
    )
    expected = torch.autograd.grad(penalty, list(parameters.values()))
    ours = added_gradients(ewc, module)
    for name, gradient in zip(parameters, expected, strict=True):
        assert gradient.any()
        torch.testing.assert_close(ours[name], gradient)


class Slow:
    """A quadratic penalty on the body, weighted by the sum of the tasks' importances."""

    def __init__(self, strength):
        self.strength = strength
        self.importances = self.anchor = None

    def penalty(self, module, x):
        if self.importances is None:
            return torch.zeros(())
        return sum(
            self.strength * (importance * (theta - anchor) ** 2).sum()
            for importance, theta, anchor in zip(
                self.importances, module.body.parameters(), self.anchor, strict=True
            )
        )

    def end_step(self, module, before, gradients):
        pass

    def end_task(self, module, stream):
        learned = self.importance(module, stream)
        if self.importances is not None:
            learned = [a + b for a, b in zip(self.importances, learned, strict=True)]
        self.importances = learned
        self.anchor = [theta.detach().clone() for theta in module.body.parameters()]


class SlowSI(Slow):
    """SI from a list of all steps of a task."""

    def __init__(self, strength, damping):
        super().__init__(strength)
        self.damping, self.start, self.steps, self.negative = damping, None, [], False

    def end_step(self, module, before, gradients):
        self.start = self.start or before
        after = [theta.detach().clone() for theta in module.body.parameters()]
        self.steps.append((before, after, gradients))

    def importance(self, module, stream):
        importances = []
        for i, theta in enumerate(module.body.parameters()):
            omega = -sum(g[i] * (after[i] - before[i]) for before, after, g in self.steps)
            self.negative |= bool((omega < 0).any())
            importances.append(torch.relu(omega) / ((theta.detach() - self.start[i]) ** 2 + self.damping))
        self.start, self.steps = None, []
        return importances


class SlowMAS(Slow):
    """MAS with one backward pass per sample."""

    def importance(self, module, stream):
        x = torch.cat([x for x, _ in stream.train_dataloader()])
        return looped_sensitivity(module, list(module.body.parameters()), x)


def looped_sensitivity(module, parameters, x):
    gradients = [torch.autograd.grad(module(one[None]).square().sum(), parameters) for one in x]
    return [torch.stack(of_one).abs().mean(0) for of_one in zip(*gradients, strict=True)]


@pytest.mark.parametrize(
    ("method", "slow"),
    [
        (partial(SI, strength=0.3, damping=0.2), partial(SlowSI, strength=0.3, damping=0.2)),
        (partial(MAS, strength=0.03), partial(SlowMAS, strength=0.03)),
    ],
    ids=["si", "mas"],
)
def test_a_stream_is_learned_as_by_hand(method, slow, tmp_path):
    method, by_hand = method(), slow()
    # Strong weight decay moves some parameters uphill, so that their ω is negative.
    net = partial(Net, heads=3, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.3))
    module = learn(method, net=net, folder=tmp_path)
    expected = learn_by_hand(by_hand, net)
    assert getattr(by_hand, "negative", True)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-6)
    ours = method.state_dict()["importance"]
    for name, importance in zip(("body.0.weight", "body.0.bias"), by_hand.importances, strict=True):
        assert importance.any()
        torch.testing.assert_close(ours[name], importance, rtol=1e-4, atol=1e-6)


class Dropping(nn.Sequential):
    """A convolutional network with batch normalisation and dropout, which evaluation mode changes."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(48, 4),
        )


def test_sensitivity_is_the_mean_over_single_samples_in_evaluation_mode(monkeypatch):
    module, x = Dropping(), torch.randn(12, 2, 4, 4)
    module(x)  # moves the running statistics off their initial values
    parameters = dict(module.named_parameters())
    expected = looped_sensitivity(module.eval(), list(parameters.values()), x[:10])
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    # Memory for three samples at a time.
    monkeypatch.setattr(
        "lightning_blip.baselines.mas.BUDGET_BYTES", 3 * sum(p.nbytes for p in parameters.values())
    )
    ours = sensitivity(module, parameters, [(part, None) for part in x.split(8)], samples=10)
    for name, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(part.training for part in module.modules())
    assert all(theta.grad is None for theta in parameters.values())


class TwoSteps(Net):
    """A module that takes two steps per batch by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for part in zip(*(one.chunk(2) for one in batch), strict=True):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(part, batch_idx))
            self.optimizers().step()


def test_si_counts_every_step_of_a_batch(tmp_path):
    """Two steps per batch of 8 are the same steps as one per batch of 4."""
    one, two = SI(), SI()
    learn(one, folder=tmp_path, stream=pairs(batch_size=4))
    learn(two, folder=tmp_path, stream=pairs(batch_size=8), net=TwoSteps)
    torch.testing.assert_close(two.state_dict(), one.state_dict())


def test_ewc_measures_what_the_module_makes_of_a_batch(tmp_path):
    """It measures each sample once, and inputs as the module's hooks change them."""

    class Doubled(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return 2 * x, y

    ewc = EWC()
    fisher = {}

    class Expected(pl.Callback):
        def on_task_end(self, trainer, pl_module, task):
            batches = [(2 * x, y) for x, y in trainer.datamodule.train_dataloader()]
            fisher.update(diagonal_fisher(pl_module, batches))

    unsure = partial(Doubled, optimizer=partial(torch.optim.SGD, lr=1e-3))  # so that drawn labels vary
    learn(ewc, Expected(), folder=tmp_path, net=unsure, max_epochs=2)
    torch.testing.assert_close(ewc.state_dict()["importance"], fisher)


def test_ewc_reads_the_output_as_its_likelihood_says(tmp_path):
    ewc, fisher = EWC(samples=30, likelihood="gaussian"), {}

    class Expected(pl.Callback):
        def on_task_end(self, trainer, pl_module, task):
            batches = trainer.datamodule.train_dataloader()
            fisher.update(diagonal_fisher(pl_module, batches, "gaussian", samples=30))

    learn(ewc, Expected(), folder=tmp_path, max_epochs=2)
    torch.testing.assert_close(ewc.state_dict()["importance"], fisher)
