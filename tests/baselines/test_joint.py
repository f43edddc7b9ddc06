"""Joint training: every sample once per epoch, in mixed order, through the head of its task."""

from collections import Counter

import pytest
import pytorch_lightning as pl
import torch

from lightning_blip import Task, TaskSequenceDataModule
from lightning_blip.baselines import JointTraining
from tests.helpers.fitting import fit
from tests.helpers.learning import NetWithHeads, learn, permuted
from tests.helpers.networks import QUIET, Net, pairs


class Watched(Net):
    """A network that collects the samples and the active head of each batch."""

    def __init__(self):
        super().__init__(heads=3)
        self.batches, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append((self.head.active, batch[0]))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append((self.head.active, dataloader_idx))
        return super().validation_step(batch, batch_idx, dataloader_idx)


def learn_jointly(folder, net=Watched, stream=None, epochs=3, **options):
    stream = pairs() if stream is None else stream
    return learn(folder=folder, net=net, stream=JointTraining(stream), max_epochs=epochs, **options)


def orders(module, epochs=3):
    """Return the batches of each epoch."""
    per_epoch = len(module.batches) // epochs
    return [module.batches[i * per_epoch : (i + 1) * per_epoch] for i in range(epochs)]


class Pictures(torch.utils.data.Dataset):
    """Samples that are not held as tensors."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def on_disk():
    tasks = [Task(task.name, Pictures(task.train), Pictures(task.val)) for task in pairs().tasks]
    return TaskSequenceDataModule(tasks, epochs_per_task=2, batch_size=16)


@pytest.mark.parametrize("stream", [pairs, on_disk])
def test_every_sample_is_seen_once_per_epoch_through_the_head_of_its_task(stream, tmp_path):
    for batches in orders(learn_jointly(tmp_path, stream=stream())):
        for task in pairs().tasks:
            x = torch.stack([x for x, _ in task.train])
            seen = torch.cat([x for head, x in batches if head == task.index])
            assert Counter(map(str, seen.tolist())) == Counter(map(str, x.tolist()))


def test_every_epoch_has_a_new_order_of_tasks_and_samples(tmp_path):
    epochs = orders(learn_jointly(tmp_path))
    heads = [[head for head, _ in batches] for batches in epochs]
    assert all(sorted(order) != order for order in heads)
    assert heads[0] != heads[1] != heads[2]
    first, second = (torch.cat([x for head, x in batches if head == 0]) for batches in epochs[:2])
    assert not torch.equal(first, second)


def test_the_order_depends_on_the_seed_of_the_sequence(tmp_path):
    one, same, other = (learn_jointly(tmp_path, stream=pairs(seed=seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(one.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert not torch.equal(one.body[0].weight, other.body[0].weight)


@pytest.mark.parametrize(
    ("net", "stream"), [(Net, permuted), (NetWithHeads, pairs)], ids=["shared head", "head per task"]
)
def test_all_tasks_are_learned_well(net, stream):
    trainer = fit((), net(), JointTraining(stream()), max_epochs=10)
    scores = [float(trainer.callback_metrics[f"val_acc/dataloader_idx_{task}"]) for task in range(3)]
    assert min(scores) > 0.95


def test_each_task_is_validated_through_its_own_head(tmp_path):
    module = learn_jointly(tmp_path)
    assert {loader for _, loader in module.validated} == {0, 1, 2}
    assert all(head == loader for head, loader in module.validated)


def test_the_position_of_the_sequence_stays(tmp_path):
    stream = pairs()
    learn_jointly(tmp_path, stream=stream)
    assert stream.learned == 0


def saving(folder, **options):
    return pl.callbacks.ModelCheckpoint(folder, filename="broken", **options)


def test_a_fit_resumed_at_the_end_of_an_epoch_equals_the_unbroken_one(tmp_path):
    unbroken = learn_jointly(tmp_path)
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    trainer = pl.Trainer(**{**QUIET, **options}, callbacks=[saving(tmp_path)], max_epochs=1)
    torch.manual_seed(0)
    trainer.fit(Watched(), datamodule=JointTraining(pairs()))
    resumed = learn_jointly(tmp_path, ckpt_path=tmp_path / "broken.ckpt")
    torch.testing.assert_close(resumed.state_dict(), unbroken.state_dict(), rtol=0, atol=0)


def test_a_fit_that_resumes_within_an_epoch_is_refused(tmp_path):
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    callback = saving(tmp_path, every_n_train_steps=2)
    trainer = pl.Trainer(**{**QUIET, **options}, callbacks=[callback], max_steps=2)
    trainer.fit(Watched(), datamodule=JointTraining(pairs()))
    with pytest.raises(ValueError, match="cannot resume in the middle of one"):
        learn_jointly(tmp_path, ckpt_path=tmp_path / "broken.ckpt")


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match="JointTraining works in one process, and the Trainer has 2"):
        fit((), Net(), JointTraining(pairs()), max_epochs=1)
