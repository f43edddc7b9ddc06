"""The streams of images: their tasks, samples, heads and networks."""

from dataclasses import replace
from functools import partial
from hashlib import sha256

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import networks
from benchmarks.data.looks import STATISTICS
from benchmarks.protocols import PROTOCOLS
from lightning_blip import TaskHeads
from lightning_blip.tasks.task import MappedDataset
from tests.helpers.data import SETS, made_up
from tests.helpers.networks import QUIET

PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
TWENTIES = [tuple(range(start, start + 20)) for start in range(0, 100, 20)]
TEN = tuple(range(10))

# The classes of each task with seed 0.
CLASSES = {
    "permuted_mnist": [TEN] * 10,
    "permuted_mnist_20": [TEN] * 20,
    "permuted_mnist_heads": [TEN] * 10,
    "permuted_mnist_heads_adam": [TEN] * 10,
    "rotated_mnist": [TEN] * 10,
    "split_mnist": PAIRS,
    "split_mnist_domain": PAIRS,
    "split_mnist_domain_drawn": [(2, 8), (4, 9), (1, 6), (7, 3), (0, 5)],
    "split_fashion": PAIRS,
    "split_cifar10": PAIRS,
    "three_sets": [TEN] * 3,
    "alternating_cifar": [classes for both in zip(PAIRS, TWENTIES, strict=True) for classes in both],
    "five_sets": [TEN] * 5,
}


def samples(part):
    return tuple(torch.stack(tensors) for tensors in zip(*part, strict=True))


def images_of(name, part="train"):
    arrays = made_up(*SETS[name])
    return torch.from_numpy(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"]).long()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_training_moves_every_parameter_of_a_network(name, data):
    protocol = replace(PROTOCOLS[name], tasks=2, epochs=1)
    pl.seed_everything(0, verbose=False)
    stream, module = protocol.stream(data, seed=0), protocol.module()
    before = [theta.detach().clone() for theta in module.parameters()]
    trainer = pl.Trainer(**QUIET, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=stream)
    assert stream.learned == 2
    scores = {f"val_acc/dataloader_idx_{task}" for task in range(2)}
    assert scores <= trainer.callback_metrics.keys()
    changed = [not theta.equal(old) for theta, old in zip(module.parameters(), before, strict=True)]
    assert all(changed)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_tasks_have_their_classes_and_fitting_heads(name, data):
    protocol = PROTOCOLS[name]
    stream, head = protocol.stream(data, seed=0), protocol.module().head
    assert len(stream) == protocol.tasks
    if name in CLASSES:
        assert [task.classes for task in stream.tasks] == CLASSES[name]
    for task in stream.tasks:
        labels = range(len(task.classes))
        for part in (task.train, task.test):
            assert sorted(set(samples(part)[1].tolist())) == list(labels)
        layer = head.heads[task.index] if isinstance(head, TaskHeads) else head
        assert layer.out_features == len(labels)


def digest(tensors):
    return sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "seed", "expected"),
    [
        ("permuted_mnist", 0, "14377a8f5e5e070f"),
        ("permuted_mnist", 1, "bf84be108a7e2824"),
        ("split_fashion", 0, "43696939dab053c2"),
        ("split_fashion", 1, "52e6b9b69d45f9a7"),
    ],
)
def test_streams_with_records_are_bit_for_bit_the_same(name, seed, expected, data):
    pl.seed_everything(seed, verbose=False)
    stream, module = PROTOCOLS[name].stream(data, seed), PROTOCOLS[name].module()
    seen = []
    for _ in range(2):
        for x, y in stream.train_dataloader():
            seen += [(255 * x).round().to(torch.uint8), y]
        stream.next_task()
    assert digest([*seen, *module.state_dict().values()]) == expected


def test_a_standardised_training_set_has_mean_0_and_deviation_1(data):
    images, labels = images_of("mnist")
    x, y = samples(PROTOCOLS["split_mnist"].stream(data, 0)[1].train)
    pixels = images.flatten(1) / 255.0
    chosen = (labels == 2) | (labels == 3)
    torch.testing.assert_close(x, ((pixels - pixels.mean()) / pixels.std())[chosen])
    assert y.equal(labels[chosen] - 2)
    first = samples(PROTOCOLS["permuted_mnist_heads"].stream(data, 0)[0].train)[0]
    torch.testing.assert_close(first[chosen], x)


def test_rotated_images_are_rotated(data):
    stream = PROTOCOLS["rotated_mnist"].stream(data, seed=0)
    assert [task.name for task in stream.tasks] == [f"{angle}°" for angle in range(0, 181, 20)]
    images = images_of("mnist")[0] / 255.0
    torch.testing.assert_close(samples(stream[0].train)[0], images)
    torch.testing.assert_close(samples(stream[9].train)[0], images.flip(1, 2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "seed", "order"),
    [
        ("three_sets", 1, ["mnist", "fashion_mnist", "cifar10"]),
        ("five_sets", 0, ["mnist", "cifar10", "notmnist", "svhn", "fashion_mnist"]),
        ("five_sets", 3, ["svhn", "fashion_mnist", "notmnist", "cifar10", "mnist"]),
    ],
)
def test_a_chain_has_one_coloured_data_set_per_task(name, seed, order, data):
    stream = PROTOCOLS[name].stream(data, seed)
    assert [task.name for task in stream.tasks] == order
    for task in stream.tasks:
        x, y = samples(task.test)
        images, labels = images_of(task.name, "test")
        assert x.shape == (len(images), 3, 32, 32)
        assert y.equal(labels)
        mean, deviation = (values[0] for values in STATISTICS[task.name])
        if images.ndim == 3:
            assert x[:, 0].equal(x[:, 1])
            assert x[:, 0].equal(x[:, 2])
            torch.testing.assert_close(x[:, 0, 2:-2, 2:-2], (images / 255.0 - mean) / deviation)
            torch.testing.assert_close(x[..., :2], torch.full_like(x[..., :2], -mean / deviation))
        else:
            expected = (images[..., 0] / 255.0 - mean) / deviation
            torch.testing.assert_close(x[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_cifar10_and_cifar100_alternate(data):
    stream = PROTOCOLS["alternating_cifar"].stream(data, seed=0)
    names = [task.name for task in stream.tasks]
    assert names[:4] == ["CIFAR-10 0-1", "CIFAR-100 0-19", "CIFAR-10 2-3", "CIFAR-100 20-39"]
    for task, source in zip(stream.tasks[2:4], ("cifar10", "cifar100"), strict=True):
        images, labels = images_of(source)
        chosen = torch.isin(labels, torch.tensor(task.classes))
        x, y = samples(task.train)
        assert y.equal(labels[chosen] - task.classes[0])
        mean, deviation = (values[0] for values in STATISTICS[source])
        expected = (images[chosen][..., 0] / 255.0 - mean) / deviation
        torch.testing.assert_close(x[:, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "source", "size"),
    [("split_mnist_domain_drawn", "mnist", 2), ("mini_imagenet_alexnet", "mini_imagenet", 5)],
)
def test_classes_are_drawn_from_the_seed(name, source, size, data):
    classes, each, _ = SETS[source]
    for seed in (0, 1):
        stream = PROTOCOLS[name].stream(data, seed)
        order = np.random.RandomState(seed).permutation(classes).tolist()
        drawn = [tuple(order[start : start + size]) for start in range(0, classes, size)]
        assert [task.classes for task in stream.tasks] == drawn
        assert [task.name for task in stream.tasks] == ["-".join(map(str, part)) for part in drawn]
    images, labels = images_of(source)
    task = stream[1]
    x, y = samples(task.train)
    assert len(x) == size * each
    for label, original in enumerate(task.classes):
        shown = x[y == label].flatten(1)
        own = images[labels == original].flatten(1) / 255.0
        assert shown.shape == own.shape
        sums = torch.stack([shown.sum(1), own.sum(1)])
        # All are normalised alike, so that the order of the sums stays.
        assert sums.argsort(1)[0].equal(sums.argsort(1)[1])


@pytest.mark.parametrize(
    ("shape", "sizes"), [((784,), [255, 45]), ((3, 32, 32), 4 * [65] + [40]), ((3, 84, 84), 9 * [32] + [12])]
)
def test_larger_images_are_validated_in_smaller_batches(shape, sizes, data):
    stream = PROTOCOLS["split_mnist"].stream(data, seed=0)
    many = TensorDataset(torch.zeros(1).expand(300, *shape), torch.zeros(300))
    stream.tasks[0] = replace(stream.tasks[0], val=MappedDataset(many))
    (loader,) = stream.val_dataloader()
    assert [len(x) for x, _ in loader] == sizes


def test_dropout_has_the_distribution_of_torchs():
    torch.manual_seed(0)
    x = torch.full((8, 16, 20, 20), 3.0).to(memory_format=torch.channels_last)
    ours, theirs = networks.Dropout(0.2), nn.Dropout(0.2)
    for module in (ours, theirs):
        assert set(module(x).unique().tolist()) == {0.0, 3.75}
        assert module(x).eq(0).float().mean() == pytest.approx(0.2, abs=0.01)
        assert module(x).is_contiguous(memory_format=torch.channels_last)
        assert module.eval()(x) is x


@pytest.mark.parametrize("name", ["split_mnist", "five_sets", "mini_imagenet_alexnet"])
def test_more_tasks_than_the_stream_has_are_refused(name, data):
    tasks = PROTOCOLS[name].tasks
    with pytest.raises(ValueError, match=f"tasks={tasks + 1} is more than the {tasks} that this stream has"):
        replace(PROTOCOLS[name], tasks=tasks + 1).stream(data, seed=0)


@pytest.mark.parametrize(
    ("network", "size", "outputs", "parameters"),
    [
        (networks.alexnet, 32, 2048, 6_503_872),
        (partial(networks.alexnet, 2, hidden=(2048, 2048)), 32, 2048, 9_218_944),
        (partial(networks.alexnet, 0.8), 32, 1638, 4_162_744),
        (partial(networks.alexnet, size=84, hidden=(2048, 512)), 84, 512, 27_416_256),
        (networks.mini_imagenet_resnet18, 84, 768, 25_106_976),
        (networks.vit_small, 32, 10, 21_342_346),
    ],
)
def test_networks_have_the_published_sizes(network, size, outputs, parameters):
    module = network()
    assert module(torch.zeros(2, 3, size, size)).shape == (2, outputs)
    assert sum(theta.numel() for theta in module.parameters()) == parameters
