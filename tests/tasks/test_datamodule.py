"""TaskSequenceDataModule: the position in the sequence, and the loaders at each position."""

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_blip import Task, TaskSequenceDataModule
from tests.helpers.networks import blobs, pairs
from tests.helpers.pictures import Pictures


def order(tasks):
    return torch.cat([x for x, _ in tasks.train_dataloader()])


def test_it_has_the_length_items_and_representation_of_a_sequence():
    tasks = pairs()
    assert len(tasks) == 3
    assert tasks[2].name == "4-5"
    assert [task.index for task in tasks] == [0, 1, 2]
    assert "> Task('0-1', classes=[0, 1], train=40, val=40, test=40), 2 epochs" in repr(tasks)
    assert "0 of 3 tasks learned" in str(tasks)
    assert tasks.remaining_epochs == 6


def test_there_is_a_validation_loader_per_task_seen_and_a_test_loader_per_task():
    tasks = pairs()
    assert (len(tasks.val_dataloader()), len(tasks.test_dataloader())) == (1, 3)
    tasks.next_task()
    assert (len(tasks.val_dataloader()), len(tasks.test_dataloader())) == (2, 3)
    seen = torch.cat([x for x, _ in tasks.val_dataloader()[1]])
    assert torch.equal(seen, tasks[1].val.batch(torch.arange(40))[0])


def test_the_order_depends_on_nothing_but_seed_task_and_epoch():
    first = order(pairs())
    assert torch.equal(first, order(pairs()))
    assert not torch.equal(first, order(pairs(seed=1)))
    later = pairs()
    later.end_epoch()
    assert not torch.equal(first, order(later))
    assert torch.equal(first.sort(0).values, order(later).sort(0).values)
    torch.manual_seed(5)
    assert torch.equal(order(pairs(batch_size=7)), first)


def test_tensors_are_read_in_whole_batches():
    tasks = pairs()
    loader = tasks.train_dataloader()
    calls = []
    held = loader.dataset
    read = held.__getitems__
    held.__class__ = type(
        "Counting",
        (type(held),),
        {"__getitems__": lambda self, indices: calls.append(len(indices)) or read(indices)},
    )
    assert sum(len(y) for _, y in loader) == 40
    assert calls == [16, 16, 8]


def test_plain_tensor_data_sets_and_data_sets_of_pictures_can_be_tasks():
    tasks = TaskSequenceDataModule(
        [Task("points", train=blobs()), Task("pictures", train=Pictures([0, 1, 2]))], batch_size=2
    )
    assert next(iter(tasks.train_dataloader()))[0].shape == (2, 8)
    assert tasks.val_dataloader() == []
    tasks.next_task()
    x, y = next(iter(tasks.train_dataloader()))
    assert (x.shape, y.shape) == ((2, 2, 2), (2,))


def test_worker_processes_read_the_same_samples():
    assert torch.equal(order(pairs(num_workers=1)), order(pairs()))


def test_the_position_is_saved_and_restored():
    tasks = pairs(epochs_per_task=[1, 3, 2])
    assert tasks.end_epoch() is True
    assert tasks.next_task() is True
    assert tasks.end_epoch() is False
    other = pairs(epochs_per_task=[1, 3, 2])
    other.load_state_dict(tasks.state_dict())
    assert (other.learned, other.epoch, other.task.name, other.remaining_epochs) == (1, 1, "2-3", 4)
    assert torch.equal(order(other), order(tasks))


def test_a_loader_resumes_within_its_epoch_and_starts_any_other_from_the_beginning():
    unbroken = pairs().train_dataloader()
    batches = iter(unbroken)
    next(batches), next(batches)
    state = unbroken.state_dict()
    resumed = pairs().train_dataloader()
    resumed.load_state_dict(state)
    rest = iter(resumed)
    assert torch.equal(next(rest)[0], next(batches)[0])
    assert resumed.state_dict() == unbroken.state_dict() != state
    assert list(rest) == []
    later = pairs()
    later.end_epoch()
    other = later.train_dataloader()
    other.load_state_dict(state)
    assert len(list(other)) == 3


def test_a_checkpoint_of_a_closed_task_has_the_task_learned():
    tasks = pairs()
    tasks.end_epoch()
    tasks.end_epoch()
    tasks.close_task()
    assert tasks.state_dict() == {"learned": 1, "epoch": 0, "crossing": True}
    assert len(tasks.val_dataloader()) == 1
    tasks.next_task()
    assert tasks.state_dict() == {"learned": 1, "epoch": 0, "crossing": False}


def test_the_last_task_stays_current_once_all_are_learned():
    tasks = pairs()
    assert [tasks.next_task() for _ in range(3)] == [True, True, False]
    assert tasks.task.index == 2
    assert tasks.remaining_epochs == 0
    assert len(tasks.val_dataloader()) == 3


def test_a_share_of_each_training_set_can_be_held_out_for_validation():
    tasks = pairs(val_fraction=0.25)
    assert [(len(t.train), len(t.val), len(t.test)) for t in tasks.tasks] == [(30, 10, 40)] * 3


def test_every_constructor_passes_its_options_on():
    images = TensorDataset(torch.rand(4, 3, 3), torch.tensor([0, 1, 0, 1]))
    options = {"batch_size": 2, "epochs_per_task": 5}
    for tasks, length in (
        (TaskSequenceDataModule.permute_inputs(images, images, tasks=3, **options), 3),
        (TaskSequenceDataModule.rotate(images, images, degrees=[0, 45], **options), 2),
        (TaskSequenceDataModule.chain([(images, images)], names=["a"], **options), 1),
        (TaskSequenceDataModule.split_classes(images, images, classes_per_task=1, **options), 2),
    ):
        assert len(tasks) == length
        assert tasks.epochs == [5] * length
        assert next(iter(tasks.train_dataloader()))[0].shape == (2, 3, 3)


EMPTY = TensorDataset(torch.zeros(0, 8), torch.zeros(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskSequenceDataModule([]), "tasks=.. is no sequence"),
        (lambda: TaskSequenceDataModule([Task("a", train=EMPTY)]), "'a' has no data in its train set"),
        (lambda: TaskSequenceDataModule([Task("a", train=blobs(), test=EMPTY)]), "no data in its val set"),
        (
            lambda: TaskSequenceDataModule(
                [Task("a", train=blobs(), test=blobs()), Task("b", train=blobs())]
            ),
            r"\['b'\] have no val set while others do",
        ),
        (
            lambda: TaskSequenceDataModule([Task("a", train=blobs()), Task("a", train=blobs())]),
            r"share the names \['a'\]",
        ),
        (lambda: pairs(epochs_per_task=[1, 2]), r"epochs_per_task=\[1, 2\] .* each of the 3 tasks"),
        (lambda: pairs(epochs_per_task=0), "epochs_per_task=0"),
        (lambda: pairs(batch_size=0), "batch_size=0"),
        (lambda: pairs(val_fraction=1.0), "val_fraction=1.0"),
        (
            lambda: TaskSequenceDataModule([Task("a", train=blobs(1))], val_fraction=0.2),
            "'a' has no data in its (train|val) set",
        ),
        (lambda: pairs().load_state_dict({"learned": 9, "epoch": 0}), "has learned 9 tasks"),
    ],
)
def test_an_invalid_argument_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
