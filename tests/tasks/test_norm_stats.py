"""Running statistics: kept per task, frozen after the first task, or shared by all tasks."""

import copy
import pickle
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.networks import Classifier, resnet18
from lightning_blip import BLIP, ForgettingCurves, TaskHeads, TaskSequenceDataModule
from lightning_blip.tasks.norm_stats import TaskStatistics, freeze, thaw
from tests.helpers.fitting import fit, same
from tests.helpers.networks import QUIET, Net, blobs, pairs

SETTINGS = ["per_task", "freeze", "shared"]


def statistics(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def loader(shift=0.0, seed=0):
    x, y = blobs(seed=seed).tensors
    return DataLoader(TensorDataset(x + shift, y), batch_size=30)


def digits_in_three_lights():
    """Return three tasks of the ten digits as small colour images, each in another light."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8).expand(-1, 3, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    train, test = slice(None, 1000), slice(1000, 1300)
    lights = [(1.0, 0.0), (-4.0, 3.0), (0.2, -4.0)]
    return TaskSequenceDataModule.chain(
        [
            (TensorDataset(c * x[train] + b, y[train]), TensorDataset(c * x[test] + b, y[test]))
            for c, b in lights
        ],
        epochs_per_task=[3, 1, 1],
        batch_size=40,
    )


class HoldTheBody(pl.Callback):
    """Keeps the weights before the heads as they are after the first task: only statistics can forget."""

    def on_task_start(self, trainer, pl_module, task):
        if task.index > 0:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.0

    def on_task_end(self, trainer, pl_module, task):
        weights = [theta.detach().clone() for theta in pl_module.body.parameters()]
        if task.index == 0:
            self.weights = weights
        assert all(torch.equal(a, b) for a, b in zip(weights, self.weights, strict=True))


def scores_with_the_body_held(setting, folder):
    torch.manual_seed(0)
    body, heads = resnet18(width=8), TaskHeads(64, classes=[10] * 3)
    body[-1] = nn.Identity()
    parts = [{"params": body.parameters()}, {"params": heads.parameters()}]
    module = Classifier(body, heads, lambda _: torch.optim.Adam(parts, lr=3e-3))
    curves = ForgettingCurves("val_acc")
    blip = BLIP(norm_stats=setting, samples=100)
    fit([blip, HoldTheBody(), curves], module, digits_in_three_lights(), default_root_dir=folder)
    return curves.matrix


@pytest.mark.parametrize("setting", ["per_task", "freeze"])
def test_without_shared_statistics_a_resnet_with_constant_weights_forgets_nothing(tmp_path, setting):
    scores = scores_with_the_body_held(setting, tmp_path)
    assert scores[0, 0] > 0.8
    assert scores[1, 0] == scores[2, 0] == scores[0, 0]
    assert scores[2, 1] == scores[1, 1]
    # With frozen statistics a new head alone learns little of another light, but it does not forget it.
    if setting == "per_task":
        assert scores[1, 1] > 0.15


def test_with_shared_statistics_a_resnet_with_constant_weights_forgets(tmp_path):
    scores = scores_with_the_body_held("shared", tmp_path)
    assert scores[0, 0] > 0.8
    assert scores[2, 0] < scores[0, 0] - 0.4
    assert scores[2, 1] < scores[1, 1] - 0.1


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_loader_is_evaluated_with_the_statistics_of_its_task(setting):
    module, blip = Net(3, norm=True), BLIP(norm_stats=setting, average=False)

    class Ends(pl.Callback):
        learned = []

        def on_task_end(self, trainer, pl_module, task):
            self.learned.append(statistics(pl_module))

    class Loaders(pl.Callback):
        seen = set()

        def on_validation_start(self, trainer, pl_module):
            self.now = statistics(pl_module)

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            past = setting == "per_task" and dataloader_idx < len(Ends.learned)
            assert same(statistics(pl_module), Ends.learned[dataloader_idx] if past else self.now)
            self.seen.add(dataloader_idx)

        def on_validation_end(self, trainer, pl_module):
            assert same(statistics(pl_module), self.now)

        on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end
        on_test_end = on_validation_end

    trainer = pl.Trainer(**QUIET, callbacks=[Ends(), blip, Loaders()], max_epochs=4)
    trainer.fit(module, datamodule=pairs())
    assert len(Ends.learned) == 2
    # The third task is not learned yet, so it is evaluated with the current statistics.
    trainer.validate(module, datamodule=pairs(), verbose=False)
    trainer.test(module, datamodule=pairs(), verbose=False)
    assert Loaders.seen == {0, 1, 2}
    differ = not same(Ends.learned[0], Ends.learned[1])
    assert differ is (setting != "freeze")


def parts(setting):
    torch.manual_seed(1)
    module = Net(3, norm=True, optimizer=partial(torch.optim.SGD, lr=0.1))
    return pairs(seed=7), module, BLIP(prior=1e-4, norm_stats=setting)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("at_validation", [False, True])
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_fit_resumed_after_any_epoch_ends_like_the_unbroken_fit(tmp_path, stop, setting, at_validation):
    tasks, whole, blip = parts(setting)
    fit(blip, whole, tasks)
    tasks, module, first = parts(setting)
    checkpoint = ModelCheckpoint(
        tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=not at_validation
    )
    fit([first, checkpoint], module, tasks, max_epochs=stop, enable_checkpointing=True)
    path = tmp_path / f"epoch={stop - 1}.ckpt"
    assert torch.load(path, weights_only=True)["callbacks"]["BLIP"]["settings"]["norm_stats"] == setting
    tasks, module, second = parts(setting)
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
    fit(second, module, tasks, path)
    assert same(module.state_dict(), whole.state_dict())
    for task in range(3):
        blip.use_task(whole, task)
        second.use_task(module, task)
        assert same(module.state_dict(), whole.state_dict())


def test_a_checkpoint_saved_while_another_task_is_shown_restores_the_current_statistics(tmp_path):
    class SaveWithin(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            self.now = statistics(pl_module)

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if len(trainer.val_dataloaders) == 2 and dataloader_idx == 0:
                self.shown = statistics(pl_module)
                trainer.save_checkpoint(tmp_path / "within.ckpt")
                raise RuntimeError("crash")

    class Restored(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.now = statistics(pl_module)

    tasks, module, blip = parts("per_task")
    saving, restored = SaveWithin(), Restored()
    with pytest.raises(RuntimeError, match="crash"):
        fit([blip, saving], module, tasks)
    assert not same(saving.shown, saving.now)
    tasks, module, blip = parts("per_task")
    fit([blip, restored], module, tasks, tmp_path / "within.ckpt")
    assert same(restored.now, saving.now)


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_checkpoint_saved_within_an_epoch_has_the_current_statistics(tmp_path, epoch):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == epoch and batch_idx == 0:
                self.now = statistics(pl_module)
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    tasks, module, blip = parts("per_task")
    save = Save()
    fit([blip, save], module, tasks)
    saved = torch.load(tmp_path / "within.ckpt", weights_only=True)
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in save.now.items())
    assert sorted(saved["callbacks"]["BLIP"]["statistics"]["kept"]) == list(range(epoch // 2))


def test_a_test_run_after_loading_a_checkpoint_uses_the_statistics_of_each_task(tmp_path):
    tasks, module, blip = parts("per_task")
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer = fit([blip, checkpoint], module, tasks, enable_checkpointing=True)
    expected = trainer.test(module, datamodule=tasks, verbose=False)
    buffers = statistics(module)
    tasks, module, blip = parts(None)
    trainer = pl.Trainer(**QUIET, callbacks=[blip])
    assert trainer.test(module, tasks, ckpt_path=tmp_path / "last.ckpt", verbose=False) == expected
    assert same(statistics(module), buffers)

    tasks, module, blip = parts(None)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    module.load_state_dict(saved["state_dict"])
    blip.load_state_dict(saved["callbacks"]["BLIP"])
    assert pl.Trainer(**QUIET, callbacks=[blip]).test(module, tasks, verbose=False) == expected


def test_the_statistics_of_a_first_sequence_are_not_used_for_a_second():
    blip, module = BLIP(norm_stats="per_task"), Net(3, norm=True)
    fit(blip, module)
    first = []
    for task in range(3):
        blip.use_task(module, task)
        first.append(statistics(module))

    class Second(pl.Callback):
        loaders = set()

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            assert not any(same(statistics(pl_module), one) for one in first)
            self.loaders.add(dataloader_idx)

    fit([blip, Second()], module)
    assert blip.tasks_learned == 6
    assert Second.loaders == {0, 1, 2}


def train(network, batches, optimizer=None):
    network.train()
    for x, y in batches:
        loss = nn.functional.cross_entropy(network(x), y)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def plain(**options):
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, **options), nn.ReLU(), nn.Linear(16, 6))


@pytest.mark.parametrize("setting", SETTINGS)
def test_in_a_plain_loop_learned_tasks_keep_their_outputs_unless_statistics_are_shared(setting):
    blip, network = BLIP(norm_stats=setting), plain()
    x = blobs().tensors[0]
    learned = []
    for task in range(3):
        blip.use_task(network, task)
        train(network, loader(shift=5.0 * task))
        blip.consolidate(network, loader(shift=5.0 * task))
        for earlier in range(task + 1):
            blip.use_task(network, earlier)
            logits = network.eval()(x + 5 * earlier)
            if earlier == task:
                learned.append(logits)
            # No optimizer stepped: only the statistics changed, and θ by rounding.
            close = torch.allclose(logits, learned[earlier], atol=1e-3)
            assert close is (setting != "shared" or earlier == task)


@pytest.mark.parametrize("by_trainer", [False, True])
def test_frozen_statistics_stay_frozen_in_a_trainer_in_a_plain_loop_and_after_loading(by_trainer):
    blip, module = BLIP(norm_stats="freeze"), Net(norm=True)

    def learn(blip, module, shift):
        if by_trainer:
            pl.Trainer(**QUIET, callbacks=[blip], max_epochs=1).fit(module, loader(shift))
        else:
            train(module, loader(shift), blip.wrap(torch.optim.SGD(module.parameters(), lr=0.1), module))

    learn(blip, module, 0.0)
    assert module.body[1].num_batches_tracked == 4
    blip.consolidate(module, loader())
    kept, scale = statistics(module), module.body[1].weight.detach().clone()
    learn(blip, module, 5.0)
    blip.consolidate(module, loader(5.0))
    assert same(statistics(module), kept)
    assert not torch.equal(module.body[1].weight, scale)
    assert "body.1.weight" in blip.bits()

    # A restored BLIP freezes the statistics of a new module before it trains.
    other, restored = Net(norm=True), BLIP()
    other.load_state_dict(module.state_dict())
    restored.load_state_dict(blip.state_dict())
    learn(restored, other, 10.0)
    assert same(statistics(other), kept)


def test_frozen_statistics_stay_frozen_in_copies_until_they_are_thawed():
    network = plain()
    for _ in range(2):
        freeze(network)
    kept = statistics(network)
    twins = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    thaw(twins[0])  # must not thaw the others
    for twin in (network, twins[1]):
        train(twin, loader())
        assert same(statistics(twin), kept)
        thaw(twin)
    for twin in (network, *twins):
        assert type(twin[1]) is nn.BatchNorm1d
        assert twin[1].training
        train(twin, loader())
        assert not same(statistics(twin), kept)


def test_statistics_frozen_after_compilation_stay_frozen():
    network = plain()
    compiled = torch.compile(network, backend="eager")
    train(compiled, loader())
    freeze(network)
    kept = statistics(network)
    train(compiled, loader())
    assert same(statistics(network), kept)


def test_another_blip_thaws_statistics_that_a_first_blip_froze():
    network, first = plain(), BLIP(norm_stats="freeze")
    first.consolidate(network, loader())
    train(network, loader())
    kept = statistics(network)
    assert network[1].num_batches_tracked == 0
    train_with = BLIP().wrap(torch.optim.SGD(network.parameters(), lr=0.1), network)
    for x, y in loader():
        nn.functional.cross_entropy(network(x), y).backward()
        train_with.step()
    assert not same(statistics(network), kept)


def test_a_task_starts_with_the_previous_statistics_and_a_batch_count_of_zero():
    blip, network = BLIP(norm_stats="per_task"), plain(momentum=None)
    train(network, loader())
    mean = network[1].running_mean.clone()
    blip.consolidate(network, loader())
    assert network[1].num_batches_tracked == 0
    assert torch.equal(network[1].running_mean, mean)
    batches = list(loader(shift=50.0))
    train(network, batches)
    expected = torch.stack([network[0](x).mean(0) for x, _ in batches]).mean(0)
    torch.testing.assert_close(network[1].running_mean, expected)
    blip.use_task(network, 0)
    assert network[1].num_batches_tracked == 4
    assert torch.equal(network[1].running_mean, mean)


def test_showing_a_learned_task_does_not_change_the_statistics_being_learned():
    blip, network = BLIP(norm_stats="per_task"), plain()
    blip.consolidate(network, loader())
    train(network, loader(5.0))
    now = statistics(network)
    blip.use_task(network, 0)
    blip.use_task(network, 0)
    blip.use_task(network, 1)
    assert same(statistics(network), now)
    # If a task is consolidated while the first is shown, the second task's statistics are kept.
    blip.use_task(network, 0)
    first = statistics(network)
    blip.consolidate(network, loader(5.0))
    blip.use_task(network, 1)
    assert same(statistics(network), now)
    # If training continues while the first task is shown, the result belongs to the current task.
    blip.use_task(network, 0)
    train(network, loader(9.0))
    third = statistics(network)
    blip.use_task(network, 0)
    assert same(statistics(network), first)
    blip.use_task(network, 2)
    assert same(statistics(network), third)


def test_predicted_forgetting_does_not_change_which_statistics_are_shown():
    network = nn.Sequential(nn.BatchNorm1d(8), TaskHeads(8, classes=[6, 6]))
    blip = BLIP()
    for shift in (0.0, 3.0):
        for x, _ in loader(shift):
            network(x)
        blip.consolidate(network, loader(shift))
    blip.use_task(network, 0)
    shown = statistics(network)
    blip.predicted_forgetting(network)
    assert same(statistics(network), shown)


def test_use_task_activates_the_head_and_refuses_unknown_tasks():
    blip = BLIP()
    network = nn.Sequential(plain(), TaskHeads(6, classes=[6, 6]))
    for task in range(2):
        with pytest.raises(ValueError, match=rf"task={task + 1} must be 0 to {task}: .* for the current one"):
            blip.use_task(network, task + 1)
        blip.use_task(network, task)
        assert network[1].active == task
        blip.consolidate(network, loader())
    blip.use_task(network, 0)
    assert network[1].active == 0
    blip.use_task(network, 1)
    # There is no third head, so the second stays active.
    blip.use_task(network, 2)
    assert network[1].active == 1
    with pytest.raises(ValueError, match="task=-1 must be 0 to 2"):
        blip.use_task(network, -1)
    narrow = nn.Sequential(plain(), TaskHeads(6, classes=[6]))
    with pytest.raises(ValueError, match="active=1 is none of the 1 heads"):
        blip.use_task(narrow, 1)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(6), nn.SyncBatchNorm(6), nn.InstanceNorm1d(6, track_running_stats=True)]
)
def test_every_kind_of_layer_with_running_statistics_is_found(layer):
    found = TaskStatistics()
    layer.running_mean.fill_(3.0)
    found.keep(layer, 0)
    layer.running_mean.fill_(4.0)
    found.show(layer, 0)
    assert (layer.running_mean == 3).all()
    freeze(layer)
    assert not layer.train().training


def test_modules_inside_a_frozen_layer_follow_train_and_eval():
    class NormAndDrop(nn.BatchNorm1d):
        def __init__(self):
            super().__init__(4)
            self.drop = nn.Dropout()

    network = nn.Sequential(NormAndDrop())
    freeze(network)
    assert not network.eval()[0].drop.training
    assert network.train()[0].drop.training
    assert not network[0].training


@pytest.mark.parametrize("setting", SETTINGS)
def test_without_running_statistics_the_state_does_not_grow_with_the_tasks(setting):
    network = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))
    blip = BLIP(norm_stats=setting)
    sizes = []
    for _ in range(3):
        blip.consolidate(network, loader())
        sizes.append(len(pickle.dumps(blip.state_dict())))
    assert sizes[0] == sizes[2]


def test_the_default_norm_stats_depend_on_the_networks_heads():
    def chosen(blip, heads):
        blip.wrap(torch.optim.SGD((module := Net(heads, norm=True)).parameters(), lr=0.1), module)
        return blip.norm_stats_in_use

    assert chosen(BLIP(), 3) == "per_task"
    assert chosen(BLIP(), 0) == "shared"
    assert chosen(BLIP(norm_stats="shared"), 3) == "shared"
    assert BLIP.paper().norm_stats == "shared"
    with pytest.raises(ValueError, match="norm_stats='own' must be one of"):
        BLIP(norm_stats="own")


def test_the_chosen_norm_stats_are_saved_and_checked():
    blip = BLIP()
    blip.consolidate(Net(3, norm=True), [(torch.randn(8, 8), torch.zeros(8))])
    saved = blip.state_dict()
    with pytest.raises(ValueError, match="norm_stats='freeze' differs from the checkpoint's 'per_task'"):
        BLIP(norm_stats="freeze").load_state_dict(saved)
    restored = BLIP()
    restored.load_state_dict(saved)
    assert restored.norm_stats_in_use == "per_task"
