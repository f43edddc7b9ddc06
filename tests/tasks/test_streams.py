"""Streams of tasks made from data sets."""

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from lightning_blip.tasks.streams import chain, hold_out, permute_inputs, rotate, split_classes
from lightning_blip.tasks.task import MappedDataset, Task, labels_of
from tests.helpers.networks import blobs
from tests.helpers.pictures import Pictures


def test_split_classes_gives_every_sample_to_one_task():
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


def test_split_classes_keeps_the_labels_without_relabel():
    tasks = split_classes(blobs(), blobs(), classes_per_task=3, relabel=False)
    assert labels_of(tasks[1].train).unique().tolist() == [3, 4, 5]


def test_split_classes_relabels_any_classes_from_zero():
    samples = TensorDataset(torch.zeros(4, 1), torch.tensor([3, 7, 9, 12]))
    tasks = split_classes(samples, samples, classes_per_task=2)
    assert [task.classes for task in tasks] == [(3, 7), (9, 12)]
    assert [tasks[1].train[i][1].item() for i in range(2)] == [0, 1]


@pytest.mark.parametrize("classes", [0, 4, 7])
def test_a_number_of_classes_that_does_not_divide_is_refused(classes):
    with pytest.raises(ValueError, match=f"classes_per_task={classes} does not divide the 6 classes"):
        split_classes(blobs(), blobs(), classes_per_task=classes)


def test_labels_are_read_without_decoding_the_inputs():
    pictures = Pictures([0, 1, 0, 1])
    tasks = split_classes(pictures, pictures, classes_per_task=1)
    assert pictures.decoded == 0
    assert [int(y) for _, y in (tasks[1].train[i] for i in range(2))] == [0, 0]
    assert tasks[1].train[1][0][0, 0] == 3.0


def test_labels_are_read_from_data_sets_without_targets_and_from_subsets():
    assert labels_of(Pictures([2, 5], with_targets=False)).tolist() == [2, 5]
    assert labels_of(Subset(Pictures([2, 5, 7]), [2, 0])).tolist() == [7, 2]


def test_permutations_are_fixed_and_different_and_keep_values_and_shape():
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
def test_rotation_by_0_and_180_degrees(shape):
    images = TensorDataset(torch.rand(2, *shape), torch.zeros(2))
    straight, turned = rotate(images, images, degrees=[0, 180])
    torch.testing.assert_close(straight.train[0][0], images.tensors[0][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(turned.train[1][0], images.tensors[0][1].flip(-1, -2), atol=1e-4, rtol=0)


def test_rotation_is_counter_clockwise_for_images_that_are_not_square():
    image = torch.zeros(1, 3, 5)
    image[0, 1, 3] = 1.0  # right of the centre
    images = TensorDataset(image, torch.zeros(1))
    turned = rotate(images, images, degrees=[90])[0].train[0][0]
    assert turned.round().nonzero().tolist() == [[0, 2]]  # above the centre


def test_inputs_that_are_not_images_and_empty_streams_are_refused():
    with pytest.raises(ValueError, match="inputs of 1 dimensions"):
        rotate(blobs(), blobs(), degrees=[10])
    with pytest.raises(ValueError, match="degrees="):
        rotate(blobs(), blobs(), degrees=[])
    with pytest.raises(ValueError, match="tasks=0"):
        permute_inputs(blobs(), blobs(), tasks=0)


def test_a_chain_has_one_task_per_data_set():
    tasks = chain([(blobs(), blobs()), (Pictures([1, 4]), Pictures([1, 4]))], names=["points", "pictures"])
    assert [(task.name, task.classes) for task in tasks] == [
        ("points", (0, 1, 2, 3, 4, 5)),
        ("pictures", (1, 4)),
    ]
    with pytest.raises(ValueError, match="1 entries for 2 data sets"):
        chain([(blobs(), blobs())] * 2, names=["one"])


def test_held_out_samples_are_not_in_the_training_set():
    task = hold_out(Task("all", train=blobs(), test=blobs(seed=1)), fraction=0.25, seed=3)
    assert (len(task.train), len(task.val), len(task.test)) == (90, 30, 120)
    kept = {tuple(task.train[i][0].tolist()) for i in range(90)}
    held = {tuple(task.val[i][0].tolist()) for i in range(30)}
    assert len(kept | held) == 120


def test_nested_mapped_data_sets_read_the_same_one_by_one_and_in_batches():
    inner = MappedDataset(blobs(), indices=torch.arange(10, 20), inputs=lambda x: x * 2)
    outer = MappedDataset(inner, indices=torch.tensor([3, 1]), labels=lambda y: y + 1)
    x, y = outer.batch(torch.tensor([0, 1]))
    for i in range(2):
        assert torch.equal(outer[i][0], x[i])
        assert outer[i][1] == y[i]
    assert torch.equal(x[0], blobs().tensors[0][13] * 2)
    assert torch.equal(labels_of(outer), y)
    assert not MappedDataset(Pictures([1])).in_memory
