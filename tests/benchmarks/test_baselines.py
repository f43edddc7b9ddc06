"""What all baselines promise: nothing done to the first task, all kept in checkpoints, and of use."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from benchmarks.baselines import EWC, GPM, MAS, SI, FineTuning, FrozenBody, LwF
from lightning_blip import ForgettingCurves
from lightning_blip.metrics import backward_transfer
from tests.benchmarks.learning import HeadATask, added_gradients, disturb, learn, permuted
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


@methods
def test_the_first_task_is_learned_as_without_it(make, tmp_path):
    ours, plain = (learn(method, folder=tmp_path, max_epochs=2) for method in (make(), FineTuning()))
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


@methods
def test_later_tasks_are_not(make, tmp_path):
    ours, plain = (learn(method, folder=tmp_path, max_epochs=3) for method in (make(), FineTuning()))
    assert not torch.equal(ours.body[0].weight, plain.body[0].weight)


@penalties
def test_heads_of_tasks_are_left_alone(make, tmp_path):
    method = make()
    module = learn(method, net=HeadATask, folder=tmp_path)
    disturb(module)
    moved = {name for name, gradient in added_gradients(method, module).items() if gradient.any()}
    assert moved == {"body.0.weight", "body.0.bias"}


@methods
@pytest.mark.parametrize("epochs", [3, 4])  # within the second task, and at its end
@pytest.mark.parametrize("net", [Net, HeadATask], ids=["shared head", "head a task"])
def test_a_resumed_fit_is_as_the_unbroken_one(make, epochs, net, tmp_path):
    options = {"folder": tmp_path, "net": net, "enable_checkpointing": True}
    unbroken = learn(make(), **options)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="broken", save_on_train_epoch_end=True)
    learn(make(), checkpoint, max_epochs=epochs, **options)
    resumed = learn(make(), ckpt_path=tmp_path / "broken.ckpt", **options)
    torch.testing.assert_close(resumed.state_dict(), unbroken.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [METHODS[name] for name in METHODS if name != "frozen"])
def test_it_keeps_old_tasks_better_than_fine_tuning(make, tmp_path):
    kept = []
    for method in (make(), FineTuning()):
        curves = ForgettingCurves()
        net = partial(Net, optimizer=partial(torch.optim.SGD, lr=0.1))
        learn(method, curves, folder=tmp_path, net=net, stream=permuted())
        assert curves.matrix.diagonal().min() > 0.9
        kept.append(float(backward_transfer(curves.matrix)))
    assert kept[0] > kept[1] + 0.1


def test_a_frozen_body_does_not_change(tmp_path):
    net = partial(Net, heads=3, norm=True, optimizer=partial(torch.optim.Adam, weight_decay=0.1))
    one, all_tasks = (
        learn(FrozenBody(), net=net, folder=tmp_path, max_epochs=epochs).state_dict() for epochs in (2, 6)
    )
    for name in one:
        changed = not torch.equal(one[name], all_tasks[name])
        assert changed == name.startswith(("head.heads.1", "head.heads.2")), name
