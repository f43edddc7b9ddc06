"""What every method promises: an unchanged first task, a state in checkpoints, and less forgetting."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

import lightning_blip.baselines
from lightning_blip import ForgettingCurves
from lightning_blip.baselines import EWC, GPM, MAS, SI, FrozenBody, LwF
from lightning_blip.metrics import backward_transfer
from tests.helpers.fitting import fit
from tests.helpers.learning import NetWithHeads, added_gradients, disturb, learn, permuted
from tests.helpers.networks import Net

METHODS = {
    "ewc": partial(EWC, strength=10.0),
    "si": partial(SI, strength=3.0),
    "mas": partial(MAS, strength=0.03),
    "lwf": partial(LwF, strength=0.5),
    "gpm": partial(GPM, threshold=0.97),
    "frozen": FrozenBody,
}
methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
penalties = pytest.mark.parametrize("make", [METHODS[name] for name in ("ewc", "si", "mas")])


def test_every_method_of_the_package_is_tested_here():
    made = {type(make()).__name__ for make in METHODS.values()}
    assert made | {"JointTraining"} == set(lightning_blip.baselines.__all__)


@methods
def test_the_first_task_is_learned_as_without_the_method(make, tmp_path):
    ours = learn(make(), folder=tmp_path, max_epochs=2)
    plain = learn(folder=tmp_path, max_epochs=2)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


@methods
def test_the_second_task_is_not_learned_as_without_the_method(make, tmp_path):
    ours, plain = learn(make(), folder=tmp_path, max_epochs=3), learn(folder=tmp_path, max_epochs=3)
    assert not torch.equal(ours.body[0].weight, plain.body[0].weight)


@penalties
def test_a_penalty_leaves_the_heads_of_tasks_alone(make, tmp_path):
    method = make()
    module = learn(method, net=NetWithHeads, folder=tmp_path)
    disturb(module)
    moved = {name for name, gradient in added_gradients(method, module).items() if gradient.any()}
    assert moved == {"body.0.weight", "body.0.bias"}


@penalties
def test_a_penalty_leaves_parameters_without_a_gradient_alone(make, tmp_path):
    method = make()
    module = learn(method, folder=tmp_path)
    disturb(module)
    module.zero_grad()
    module.body[0].weight.grad = torch.zeros_like(module.body[0].weight)
    method.on_before_optimizer_step(None, module, None)
    assert module.body[0].weight.grad.any()
    assert all(theta.grad is None for theta in module.head.parameters())


@methods
@pytest.mark.parametrize("epochs", [3, 4])  # within the second task, and at its end
@pytest.mark.parametrize("net", [Net, NetWithHeads], ids=["shared head", "head per task"])
def test_a_resumed_fit_equals_the_unbroken_one(make, epochs, net, tmp_path):
    options = {"folder": tmp_path, "net": net, "enable_checkpointing": True}
    unbroken = learn(make(), **options)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="broken", save_on_train_epoch_end=True)
    learn(make(), checkpoint, max_epochs=epochs, **options)
    resumed = learn(make(), ckpt_path=tmp_path / "broken.ckpt", **options)
    torch.testing.assert_close(resumed.state_dict(), unbroken.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [METHODS[name] for name in METHODS if name != "frozen"])
def test_it_forgets_less_than_fine_tuning(make, tmp_path):
    kept = []
    for method in ([make()], []):
        curves = ForgettingCurves()
        net = partial(Net, optimizer=partial(torch.optim.SGD, lr=0.1))
        learn(*method, curves, folder=tmp_path, net=net, stream=permuted())
        assert curves.matrix.diagonal().min() > 0.9
        kept.append(float(backward_transfer(curves.matrix)))
    assert kept[0] > kept[1] + 0.1


@methods
def test_it_works_in_the_other_package_of_lightning(make):
    other = pytest.importorskip("lightning.pytorch")
    assert isinstance(make(), other.Callback)


class TwoOptimizers(Net):
    """A module with one optimizer for the body and one for the head."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]


@methods
def test_a_second_optimizer_is_refused_at_the_start(make):
    with pytest.raises(ValueError, match="works with one optimizer, and TwoOptimizers has 2"):
        fit(make(), TwoOptimizers())


@methods
def test_a_data_module_without_tasks_is_refused_at_the_start(make):
    class Plain(pl.LightningDataModule):
        pass

    with pytest.raises(ValueError, match="datamodule=Plain has no tasks"):
        fit(make(), tasks=Plain())


@methods
def test_several_processes_are_refused_at_the_start(make, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match="works in one process, and the Trainer has 2"):
        fit(make())


class OtherForward(Net):
    """A module whose training step does not use its forward, which takes two arguments."""

    def forward(self, x, mask):
        return self.head(self.body(x * mask))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass


class OtherNames(Net):
    """A module whose parts are called otherwise."""

    def __init__(self):
        super().__init__()
        self.encoder, self.classifier = self.body, self.head
        del self.body, self.head

    def forward(self, x):
        return self.classifier(self.encoder(x))


class Unused(Net):
    """A module that computes its logits without its head."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(16, 6)

    def forward(self, x):
        return self.other(self.body(x))


class OneLogit(Net):
    """A module with one output, for two classes."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 1)

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float())


class TellsTasks(pl.Callback):
    """Collects the tasks that ended."""

    def __init__(self):
        self.ended = []

    def on_task_end(self, trainer, pl_module, task):
        self.ended.append(task)


class DependsOnValues(Net):
    """A module whose forward branches on a value, which vmap cannot."""

    def forward(self, x):
        return x if x.sum().item() == 0.5 else super().forward(x)


@pytest.mark.parametrize(
    ("make", "net", "message"),
    [
        (EWC, OtherForward, "EWC cannot measure what it needs of OtherForward"),
        (MAS, OtherForward, "MAS cannot measure what it needs of OtherForward"),
        (MAS, DependsOnValues, "MAS cannot measure what it needs of DependsOnValues"),
        (GPM, OtherForward, "GPM cannot measure what it needs of OtherForward"),
        (FrozenBody, OtherNames, "body='body' is no part of OtherNames.*such as encoder, classifier"),
        (LwF, OtherNames, "body='body' is no part of OtherNames"),
        (LwF, Unused, r"needs Unused.training_step to compute head\(body\(x\)\)"),
        (LwF, OneLogit, r"at least 2 classes, and OneLogit.head gives \(16, 1\)"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_in_the_first_batch(make, net, message):
    tasks = TellsTasks()
    with pytest.raises(ValueError, match=message):
        fit([make(), tasks], net())
    assert not tasks.ended


@pytest.mark.parametrize(
    "make", [partial(FrozenBody, body="encoder"), partial(LwF, body="encoder", head="classifier")]
)
def test_parts_are_found_by_name(make, tmp_path):
    names = {"encoder": "body", "classifier": "head"}
    module = learn(make(), net=OtherNames, folder=tmp_path)
    usual = learn(make.func(), folder=tmp_path)
    ours = {}
    for name, value in module.state_dict().items():
        part, _, rest = name.partition(".")
        ours[f"{names[part]}.{rest}"] = value
    torch.testing.assert_close(ours, dict(usual.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (EWC, {"strength": -1.0}, "strength=-1.0 must not be negative"),
        (EWC, {"samples": 0}, "samples=0 must be at least 1"),
        (EWC, {"likelihood": "categoricl"}, "likelihood='categoricl' is not known"),
        (SI, {"strength": float("nan")}, "strength=nan must not be negative"),
        (SI, {"damping": 0.0}, "damping=0.0 must be positive"),
        (MAS, {"strength": -1.0}, "strength=-1.0 must not be negative"),
        (MAS, {"samples": 0}, "samples=0 must be at least 1"),
        (LwF, {"strength": -1.0}, "strength=-1.0 must not be negative"),
        (LwF, {"temperature": 0.0}, "temperature=0.0 must be positive"),
        (GPM, {"first_threshold": 95}, "first_threshold=95 must be a share"),
        (GPM, {"threshold": -0.1}, "threshold=-0.1 must be a share"),
        (GPM, {"samples": 0}, "samples=0 must be at least 1"),
    ],
)
def test_a_wrong_argument_is_refused_in_the_constructor(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("make", [LwF, GPM])
def test_mixed_precision_is_refused_at_the_start(make):
    with pytest.raises(ValueError, match="does not work in mixed precision, as in precision='bf16-mixed'"):
        fit(make(), precision="bf16-mixed")


def test_a_frozen_body_does_not_change(tmp_path):
    net = partial(Net, heads=3, norm=True, optimizer=partial(torch.optim.Adam, weight_decay=0.1))
    one, all_tasks = (
        learn(FrozenBody(), net=net, folder=tmp_path, max_epochs=epochs).state_dict() for epochs in (2, 6)
    )
    for name in one:
        changed = not torch.equal(one[name], all_tasks[name])
        assert changed == name.startswith(("head.heads.1", "head.heads.2")), name
