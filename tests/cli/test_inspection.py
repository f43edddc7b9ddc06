"""``lightning-blip inspect`` shows what BLIP has frozen, and refuses other files in a sentence."""

import re
from pathlib import Path

import pytest
import torch

from lightning_blip import BLIP
from lightning_blip.checkpoint import VERSION
from lightning_blip.cli import main as cli
from lightning_blip.cli.inspection import frozen_layers, read_blip, whole_network
from tests.helpers.fitting import fit
from tests.helpers.networks import Net


class Mine(BLIP):
    """A user's subclass, whose state Lightning saves under another name."""


class Foreign:
    pass


@pytest.fixture(scope="module", params=["diagonal", "kronecker", "paper"])
def trained(request, tmp_path_factory):
    """Return a trained BLIP, and the checkpoint that holds it."""
    kinds = {"diagonal": Mine, "kronecker": lambda: BLIP(basis="kronecker"), "paper": BLIP.paper}
    blip = kinds[request.param]()
    trainer = fit(blip, Net(norm=True))
    path = tmp_path_factory.mktemp("trained") / "whole.ckpt"
    trainer.save_checkpoint(path)
    return blip, path


def test_the_frozen_bits_of_each_layer_are_counted(trained):
    blip, _ = trained
    layers = frozen_layers(blip)
    assert sorted(layer.name for layer in layers) == ["body.0", "body.1", "head"]
    for layer in layers:
        bits = torch.cat([b.flatten() for name, b in blip.bits().items() if name.startswith(layer.name)])
        bits = bits.double()
        assert layer.counts == [int((bits == n).sum()) for n in range(blip.max_bits + 1)]
        assert layer.values == len(bits)
        assert layer.mean_bits == pytest.approx(float(bits.mean()))
        assert layer.used_capacity == pytest.approx(float(bits.mean()) / 20)
        assert layer.frozen_share == pytest.approx(float((bits > 0).double().mean()))
    network = whole_network(layers)
    assert network.values == 246 + 32
    assert network.used_capacity == pytest.approx(blip.used_capacity)


def test_a_checkpoint_and_a_saved_state_are_read_as_they_were_trained(trained, tmp_path):
    blip, path = trained
    torch.save(blip.state_dict(), tmp_path / "alone.pt")
    for file in (path, tmp_path / "alone.pt"):
        again = read_blip(file)
        assert frozen_layers(again) == frozen_layers(blip)
        assert (again.tasks_learned, again.chosen, again.basis) == (3, blip.chosen, blip.basis)


def test_the_printed_table_and_histogram_hold_the_counts(trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    blip, path = trained
    cli.main(["inspect", str(path)])
    printed = capsys.readouterr().out
    first = printed.splitlines()[0]
    assert first.startswith(f"3 tasks learned, {blip.basis} basis")
    assert blip.chosen
    for name, value in blip.chosen.items():
        assert f"{name} {value:.3g}" in first
    rows = {
        row[0]: row[1:]
        for row in re.findall(r"^│ (\S+) +│ +(\d+) │ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │", printed, re.M)
    }
    layers = [*frozen_layers(blip), whole_network(frozen_layers(blip))]
    assert rows == {
        layer.name: (
            str(layer.values),
            f"{layer.mean_bits:.3f}",
            f"{100 * layer.used_capacity:.2f}",
            f"{100 * layer.frozen_share:.2f}",
        )
        for layer in layers
    }
    assert f"Capacity left: {100 * (1 - blip.used_capacity):.2f} %" in printed
    bars = {
        int(n): (len(bar), int(count))
        for n, bar, count in re.findall(r"^ +(\d+)  (█*)\S? +(\d+) ", printed, re.M)
    }
    counts = layers[-1].counts
    assert {n: count for n, (_, count) in bars.items()} == dict(enumerate(counts[: max(bars) + 1]))
    assert sum(counts[max(bars) + 1 :]) == 0
    assert all(length == int(40 * count / max(counts)) for length, count in bars.values())


def test_a_blip_that_learned_nothing_is_shown(tmp_path, capsys):
    torch.save(BLIP().state_dict(), tmp_path / "new.pt")
    cli.main(["inspect", str(tmp_path / "new.pt")])
    assert capsys.readouterr().out.startswith("0 tasks learned, diagonal basis")


def spoiled(how, path, tmp_path):
    """Write a file that is spoiled in one way, and return its path."""
    file = tmp_path / "spoiled.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (part for part in checkpoint["callbacks"].values() if "frozen" in part)
    if how == "folder":
        return tmp_path
    if how == "text":
        file.write_text("not a checkpoint\n")
    elif how == "empty":
        file.touch()
    elif how == "cut":
        file.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "without":
        torch.save({"state_dict": checkpoint["state_dict"], "callbacks": {}}, file)
    elif how == "tensor":
        torch.save(torch.zeros(3), file)
    elif how == "newer":
        settings = state["settings"] | {"colour": "blue"}
        torch.save(state | {"version": VERSION + 1, "settings": settings}, file)
    elif how == "damaged":
        frozen = {**state["frozen"], "parameters": {"head.weight": {"gained": None}}}
        torch.save(state | {"frozen": frozen}, file)
    elif how == "foreign":
        torch.save(checkpoint | {"hyper_parameters": {"net": Foreign()}}, file)
    return file


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("missing", "cannot be read: No such file or directory"),
        ("folder", "cannot be read: Is a directory"),
        ("text", "is not a checkpoint, or was cut short"),
        ("empty", "is not a checkpoint, or was cut short"),
        ("cut", "is not a checkpoint, or was cut short"),
        ("without", "holds no state of BLIP"),
        ("tensor", "holds no state of BLIP"),
        ("newer", f"version {VERSION + 1} of what BLIP learned, this is version {VERSION}: update"),
        ("damaged", "damaged"),
        ("foreign", "also holds a tests.cli.test_inspection.Foreign"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_a_sentence(how, expected, trained, tmp_path):
    file = spoiled(how, trained[1], tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", str(file)])
    message = str(end.value.code)
    assert message.startswith(str(file))
    assert expected in message
    assert "\n" not in message


def test_the_code_in_the_message_about_foreign_types_works(trained, tmp_path):
    blip, path = trained
    file = spoiled("foreign", path, tmp_path)
    with pytest.raises(ValueError, match="Foreign") as error:
        read_blip(file)
    code = re.search(r"torch\.save\(.*\"blip\.pt\"\)", str(error.value))[0]
    exec(code.replace('"BLIP"', repr(blip.state_key)), {"torch": torch, "path": file})
    assert frozen_layers(read_blip(Path("blip.pt"))) == frozen_layers(blip)
