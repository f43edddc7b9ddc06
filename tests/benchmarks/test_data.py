"""The data sets: small made-up ones are read back from files in every format."""

import gzip
import io
import pickle
import re
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from benchmarks.data import load
from benchmarks.data.loader import READERS
from benchmarks.data.looks import STATISTICS, coloured, flat, padded, standardised, upright
from tests.helpers.data import SETS, made_up


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Keep the user's cache clean."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def assert_read(folder, name, arrays):
    """Assert that the loaded training and test sets are these arrays, scaled to [0, 1]."""
    for part, samples in zip(("train", "test"), load(folder, name, upright), strict=True):
        x, y = samples.tensors
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        torch.testing.assert_close(x, torch.from_numpy(arrays[f"x_{part}"]) / 255.0, rtol=0, atol=0)
        assert y.tolist() == arrays[f"y_{part}"].tolist()


def by_class(arrays):
    """Return the arrays in the order of the labels."""
    ordered = {}
    for part in ("train", "test"):
        order = np.argsort(arrays[f"y_{part}"], kind="stable")
        ordered |= {f"{field}_{part}": arrays[f"{field}_{part}"][order] for field in "xy"}
    return ordered


def write_picture(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.mark.parametrize("name", SETS)
def test_arrays_are_read(name, data):
    assert_read(data, name, made_up(*SETS[name]))


def encoded(image):
    # PNG loses nothing, and Pillow recognises the format by itself.
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def test_jpeg_images_are_decoded_once(tmp_path, monkeypatch):
    arrays = made_up(*SETS["cifar10"])
    held = {}
    for part in ("train", "test"):
        files = [encoded(image) for image in arrays[f"x_{part}"]]
        held |= {
            f"jpeg_{part}": np.frombuffer(b"".join(files), np.uint8),
            f"size_{part}": np.array([len(file) for file in files]),
            f"y_{part}": arrays[f"y_{part}"],
        }
    np.savez(tmp_path / "cifar10_jpeg.npz", **held)
    assert_read(tmp_path, "cifar10", arrays)
    monkeypatch.delattr(Image, "open")
    assert_read(tmp_path, "cifar10", arrays)
    assert len(list((Path.home() / ".cache" / "lightning_blip").iterdir())) == 1


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "folder", "given"),
    [
        ("mnist", "mnist", ""),
        ("mnist", "MNIST/raw", ""),
        ("mnist", "mnist", "mnist"),
        ("fashion_mnist", "FashionMNIST/raw", ""),
        ("fashion_mnist", "fashion-mnist", "fashion-mnist"),
    ],
)
def test_idx_files_are_read_from_a_folder_of_the_name_of_the_set(name, folder, given, zipped, tmp_path):
    arrays = made_up(*SETS[name])
    (tmp_path / folder).mkdir(parents=True)
    for part, stem in (("train", "train"), ("test", "t10k")):
        for field, kind in (("x", "images"), ("y", "labels")):
            array = arrays[f"{field}_{part}"]
            shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
            file = bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()
            path = tmp_path / folder / f"{stem}-{kind}-idx{array.ndim}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(file) if zipped else file)
    assert_read(tmp_path / given, name, arrays)
    other = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}[name]
    with pytest.raises(FileNotFoundError):
        load(tmp_path / given, other)


def batch(x, **labels):
    pictures = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    return pickle.dumps({b"data": pictures} | {name.encode(): y.tolist() for name, y in labels.items()})


def cifar10_batches(arrays):
    x, y = (np.split(arrays[f"{field}_train"], 5) for field in "xy")
    files = {f"data_batch_{i + 1}": batch(x[i], labels=y[i]) for i in range(5)}
    return files | {"test_batch": batch(arrays["x_test"], labels=arrays["y_test"])}


def cifar100_batches(arrays):
    return {
        part: batch(
            arrays[f"x_{part}"], fine_labels=arrays[f"y_{part}"], coarse_labels=arrays[f"y_{part}"] // 5
        )
        for part in ("train", "test")
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "batches", "directory", "archive"),
    [
        ("cifar10", cifar10_batches, "cifar-10-batches-py", "cifar-10-python.tar.gz"),
        ("cifar100", cifar100_batches, "cifar-100-python", "cifar-100-python.tar.gz"),
    ],
)
def test_cifar_batches_are_read_from_folders_and_archives(
    name, batches, directory, archive, packed, tmp_path
):
    arrays = made_up(*SETS[name])
    source = tmp_path / ("elsewhere" if packed else "") / directory
    source.mkdir(parents=True)
    for file, content in batches(arrays).items():
        (source / file).write_bytes(content)
    if packed:
        with tarfile.open(tmp_path / archive, "w:gz") as tar:
            tar.add(source, directory)
    assert_read(tmp_path, name, arrays)


@pytest.mark.parametrize("inside", ["", "svhn"])
def test_mat_files_of_svhn_are_read(inside, tmp_path):
    arrays = made_up(*SETS["svhn"])
    (tmp_path / inside).mkdir(exist_ok=True)
    for part in ("train", "test"):
        labels = np.where(arrays[f"y_{part}"] == 0, 10, arrays[f"y_{part}"])[:, None]
        pictures = arrays[f"x_{part}"].transpose(1, 2, 3, 0)
        savemat(tmp_path / inside / f"{part}_32x32.mat", {"X": pictures, "y": labels})
    assert_read(tmp_path, "svhn", arrays)


def test_notmnist_is_read_without_its_broken_pictures(tmp_path, capsys):
    arrays = made_up(*SETS["notmnist"])
    for part, size in (("train", "large"), ("test", "small")):
        for i, (x, y) in enumerate(zip(arrays[f"x_{part}"], arrays[f"y_{part}"], strict=True)):
            write_picture(tmp_path / f"notMNIST_{size}" / "ABCDEFGHIJ"[y] / f"{i:03}.png", x)
    (tmp_path / "notMNIST_large" / "B" / "000.png").write_bytes(b"")
    (tmp_path / "notMNIST_large" / "B" / "999.png").write_bytes(b"broken")
    assert_read(tmp_path, "notmnist", by_class(arrays))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("B: 2 of 4 pictures are broken and skipped")


def test_every_tenth_picture_of_notmnist_small_alone_is_for_testing(tmp_path):
    for letter in "ABCDEFGHIJ":
        for i in range(20):
            write_picture(
                tmp_path / "notMNIST_small" / letter / f"{i:02}.png", np.full((28, 28), i, np.uint8)
            )
    train, test = load(tmp_path, "notmnist", upright)
    assert (255 * test.tensors[0][:, 0, 0]).round().tolist() == [9, 19] * 10
    assert test.tensors[1].tolist() == [label for label in range(10) for _ in range(2)]
    assert len(train) == 180


def mini_imagenet(classes, each):
    """Return images whose pixels encode the class and the number of the image."""
    images = np.zeros((classes, each, 84, 84, 3), np.uint8)
    images[..., 0] = np.arange(classes)[:, None, None, None]
    images[..., 1] = (np.arange(each) // 256)[:, None, None]
    images[..., 2] = (np.arange(each) % 256)[:, None, None]
    return images


def assert_mini_imagenet(folder, classes, each):
    train, test = load(folder, "mini_imagenet", upright)
    for samples, which in ((train, range(500)), (test, range(500, each))):
        x, y = samples.tensors
        pixels = (255 * x[:, 0, 0]).round().long()
        assert y.tolist() == [label for label in range(classes) for _ in which]
        assert pixels[:, 0].tolist() == y.tolist()
        assert (256 * pixels[:, 1] + pixels[:, 2]).tolist() == [*which] * classes


@pytest.mark.parametrize("inside", ["", "mini-imagenet"])
def test_mini_imagenet_is_read_from_pickles(inside, tmp_path):
    images = mini_imagenet(4, 502)
    (tmp_path / inside).mkdir(exist_ok=True)
    for part, classes in (("train", [0, 1]), ("val", [2]), ("test", [3])):
        indices = {f"n0{c}": list(range(i * 502, (i + 1) * 502)) for i, c in enumerate(classes)}
        held = {"image_data": images[classes].reshape(-1, 84, 84, 3), "class_dict": indices}
        path = tmp_path / inside / f"mini-imagenet-cache-{part}.pkl"
        path.write_bytes(pickle.dumps(held))
    assert_mini_imagenet(tmp_path, 4, 502)


def test_mini_imagenet_is_read_from_folders(tmp_path):
    images = mini_imagenet(2, 502)
    for name, part, pictures in (("n02", "train", images[0]), ("n07", "val", images[1])):
        for i, picture in enumerate(pictures):
            write_picture(tmp_path / "mini_imagenet" / part / name / f"{i:03}.png", picture)
    assert_mini_imagenet(tmp_path, 2, 502)


def test_pictures_of_another_size_are_scaled_to_84_by_84(tmp_path):
    for i in range(501):
        write_picture(tmp_path / "mini_imagenet" / "n01" / f"{i}.jpg", np.full((6, 9, 3), 200, np.uint8))
    train, _ = load(tmp_path, "mini_imagenet", upright)
    assert train.tensors[0].shape == (500, 84, 84, 3)


@pytest.fixture
def hub(monkeypatch):
    """Replace the ``datasets`` library by one with made-up images; return the list of its calls."""
    arrays = made_up(*SETS["cifar10"])
    asked = []

    def load_dataset(*source):
        asked.append(source)
        images = "img" if source == ("uoft-cs/cifar10",) else "image"
        return {
            part: {
                images: [Image.fromarray(x) for x in arrays[f"x_{part}"]],
                "label": arrays[f"y_{part}"].tolist(),
            }
            for part in ("train", "test")
        }

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("name", "source"),
    [("cifar10", ("uoft-cs/cifar10",)), ("svhn", ("ufldl-stanford/svhn", "cropped_digits"))],
)
def test_a_data_set_of_the_hub_is_read(name, source, hub):
    assert_read(Path("hub"), name, made_up(*SETS["cifar10"]))
    assert hub == [source]


def test_the_hub_is_asked_only_if_a_folder_has_no_data(hub, data, tmp_path):
    Path("hub").symlink_to(data)
    assert_read(Path("hub"), "cifar10", made_up(*SETS["cifar10"]))
    with pytest.raises(FileNotFoundError):
        load(tmp_path, "svhn")
    assert hub == []


def test_an_error_of_the_hub_names_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load(Path("hub"), "mnist")
    with pytest.raises(ValueError, match="--data hub does not have notmnist, only mnist"):
        load(Path("hub"), "notmnist")


@pytest.mark.parametrize("name", READERS)
def test_an_error_of_a_missing_set_names_all_its_formats(name, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"--data {tmp_path} does not hold the data set {name}")
    ) as raised:
        load(tmp_path, name)
    for form, _ in READERS[name]:
        assert form in str(raised.value)


def test_images_are_flattened_and_standardised(data):
    images = made_up(*SETS["mnist"])["x_train"].reshape(40, 784)
    (x, _), _ = (part.tensors for part in load(data, "mnist", flat))
    assert x.equal(torch.from_numpy(images) / 255.0)
    (x, _), _ = (part.tensors for part in load(data, "mnist", standardised))
    expected = (images - images.mean()) / images.std()
    torch.testing.assert_close(x.double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-4)


def test_grey_images_are_padded_and_get_three_equal_channels(data):
    images = torch.from_numpy(made_up(*SETS["mnist"])["x_test"]) / 255.0
    _, (x, _) = (part.tensors for part in load(data, "mnist", coloured))
    assert x.shape == (40, 3, 32, 32)
    assert x[:, 0].equal(x[:, 1])
    assert x[:, 0].equal(x[:, 2])
    torch.testing.assert_close(x[:, 0, 2:-2, 2:-2], (images - 0.1) / 0.2752)
    margin = torch.ones(32, 32, dtype=torch.bool)
    margin[2:-2, 2:-2] = False
    torch.testing.assert_close(x[..., margin], torch.full((40, 3, 240), -0.1 / 0.2752))
    _, (row, _) = (part.tensors for part in load(data, "mnist", padded))
    assert row.shape == (40, 1024)


@pytest.mark.parametrize("name", ["cifar10", "mini_imagenet"])
def test_coloured_images_are_normalised_per_channel_without_a_margin(name, data):
    images = made_up(*SETS[name])["x_train"]
    (x, _), _ = (part.tensors for part in load(data, name, coloured))
    for channel, (mean, deviation) in enumerate(zip(*STATISTICS[name], strict=True)):
        expected = (images[..., channel] / 255.0 - mean) / deviation
        np.testing.assert_allclose(x[:, channel].numpy(), expected, rtol=1e-4, atol=1e-5)
