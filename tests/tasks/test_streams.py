"""From data sets to tasks."""

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_blip.tasks.streams import chain, hold_out, permute_inputs, rotate, split_classes
from lightning_blip.tasks.task import MappedDataset, Task, labels_of
from tests.helpers.networks import blobs


class Pictures(Dataset):
    """A set in the manner of torchvision's: lists of targets, inputs decoded one at a time."""

    def __init__(self, labels, with_targets=True):
        self.decoded = 0
        self.labels = labels
        if with_targets:
            self.targets = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.decoded += 1
        return torch.full((2, 2), float(index)), self.labels[index]


def test_split_classes_deals_every_sample_to_its_task_once():
    train, test = blobs(), blobs(60, seed=1)
    tasks = split_classes(train, test, classes_per_task=2)
    assert [task.classes for task in tasks] == [(0, 1), (2, 3), (4, 5)]
    assert [len(task.train) for task in tasks] == [40, 40, 40]
    assert [len(task.test) for task in tasks] == [20, 20, 20]
    x, y = tasks[1].train.batch(torch.arange(40))
    expected = (train.tensors[1] == 2) | (train.tensors[1] == 3)
    assert torch.equal(x, train.tensors[0][expected])
    assert torch.equal(y, train.tensors[1][expected] - 2)
    assert torch.equal(labels_of(tasks[1].train), y)
    assert tasks[0].val is tasks[0].test


def test_split_classes_keeps_the_labels_if_asked():
    tasks = split_classes(blobs(), blobs(), classes_per_task=3, relabel=False)
    assert labels_of(tasks[1].train).unique().tolist() == [3, 4, 5]


def test_split_classes_relabels_classes_that_do_not_start_at_zero_or_have_gaps():
    samples = TensorDataset(torch.zeros(4, 1), torch.tensor([3, 7, 9, 12]))
    tasks = split_classes(samples, samples, classes_per_task=2)
    assert [task.classes for task in tasks] == [(3, 7), (9, 12)]
    assert [tasks[1].train[i][1].item() for i in range(2)] == [0, 1]


@pytest.mark.parametrize("classes", [0, 4, 7])
def test_a_split_that_does_not_divide_is_refused(classes):
    with pytest.raises(ValueError, match=f"classes_per_task={classes} does not divide the 6 classes"):
        split_classes(blobs(), blobs(), classes_per_task=classes)


def test_labels_are_found_without_decoding():
    pictures = Pictures([0, 1, 0, 1])
    tasks = split_classes(pictures, pictures, classes_per_task=1)
    assert pictures.decoded == 0
    assert [int(y) for _, y in (tasks[1].train[i] for i in range(2))] == [0, 0]
    assert tasks[1].train[1][0][0, 0] == 3.0


def test_labels_of_other_sets():
    assert labels_of(Pictures([2, 5], with_targets=False)).tolist() == [2, 5]
    assert labels_of(Subset(Pictures([2, 5, 7]), [2, 0])).tolist() == [7, 2]


def test_permutations_are_fixed_differ_and_keep_the_values_and_the_shape():
    images = TensorDataset(torch.rand(5, 3, 4), torch.arange(5))
    tasks = permute_inputs(images, images, tasks=3, seed=1)
    first, second, third = (task.train.batch(torch.arange(5))[0] for task in tasks)
    assert torch.equal(first, images.tensors[0])
    assert second.shape == images.tensors[0].shape
    assert not torch.equal(second, first)
    assert not torch.equal(second, third)
    assert torch.equal(second.flatten(1).sort().values, first.flatten(1).sort().values)
    assert torch.equal(tasks[1].test[2][0], second[2])
    again = permute_inputs(images, images, tasks=3, seed=1)
    assert torch.equal(again[2].train[0][0], third[0])
    other = permute_inputs(images, images, tasks=3, seed=2)
    assert not torch.equal(other[2].train[0][0], third[0])


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (2, 4, 8)])
def test_rotation_keeps_shape_and_zero_degrees_change_nothing(shape):
    images = TensorDataset(torch.rand(2, *shape), torch.zeros(2))
    straight, turned = rotate(images, images, degrees=[0, 180])
    torch.testing.assert_close(straight.train[0][0], images.tensors[0][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(turned.train[1][0], images.tensors[0][1].flip(-1, -2), atol=1e-4, rtol=0)


def test_rotation_turns_counter_clockwise_also_where_sides_differ():
    image = torch.zeros(1, 3, 5)
    image[0, 1, 3] = 1.0  # right of the centre
    images = TensorDataset(image, torch.zeros(1))
    turned = rotate(images, images, degrees=[90])[0].train[0][0]
    assert turned.round().nonzero().tolist() == [[0, 2]]  # above the centre


def test_rotation_refuses_what_is_no_image_and_no_angles():
    with pytest.raises(ValueError, match="inputs of 1 dimensions"):
        rotate(blobs(), blobs(), degrees=[10])
    with pytest.raises(ValueError, match="degrees="):
        rotate(blobs(), blobs(), degrees=[])
    with pytest.raises(ValueError, match="tasks=0"):
        permute_inputs(blobs(), blobs(), tasks=0)


def test_a_chain_has_a_task_for_each_set():
    tasks = chain([(blobs(), blobs()), (Pictures([1, 4]), Pictures([1, 4]))], names=["points", "pictures"])
    assert [(task.name, task.classes) for task in tasks] == [
        ("points", (0, 1, 2, 3, 4, 5)),
        ("pictures", (1, 4)),
    ]
    with pytest.raises(ValueError, match="1 entries for 2 data sets"):
        chain([(blobs(), blobs())] * 2, names=["one"])


def test_held_out_samples_are_not_trained_on():
    task = hold_out(Task("all", train=blobs(), test=blobs(seed=1)), fraction=0.25, seed=3)
    assert (len(task.train), len(task.val), len(task.test)) == (90, 30, 120)
    kept = {tuple(task.train[i][0].tolist()) for i in range(90)}
    held = {tuple(task.val[i][0].tolist()) for i in range(30)}
    assert len(kept | held) == 120


def test_maps_of_maps_read_the_same_one_by_one_and_in_batches():
    inner = MappedDataset(blobs(), indices=torch.arange(10, 20), inputs=lambda x: x * 2)
    outer = MappedDataset(inner, indices=torch.tensor([3, 1]), labels=lambda y: y + 1)
    x, y = outer.batch(torch.tensor([0, 1]))
    for i in range(2):
        assert torch.equal(outer[i][0], x[i])
        assert outer[i][1] == y[i]
    assert torch.equal(x[0], blobs().tensors[0][13] * 2)
    assert torch.equal(labels_of(outer), y)
    assert not MappedDataset(Pictures([1])).in_memory
