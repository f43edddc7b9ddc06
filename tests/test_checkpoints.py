"""What a checkpoint holds of BLIP: read by later versions, refused where it is another's or damaged."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_blip import BLIP
from lightning_blip.checkpoint import VERSION
from tests.golden.write import BLIPS, FOLDER
from tests.helpers.networks import QUIET, Net, pairs

KINDS = pytest.mark.parametrize("kind", BLIPS)


def same(a, b):
    """Whether two saved states are equal, tensor by tensor."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@KINDS
@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_a_checkpoint_of_any_version_is_gone_on_from(version, kind):
    path = FOLDER / f"version-{version}-{kind}.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]["BLIP"]
    blip, tasks = BLIPS[kind](), pairs()
    blip.load_state_dict(saved)
    assert blip.tasks_learned == 2
    capacity = blip.used_capacity
    assert 0 < capacity < 1
    pl.Trainer(**QUIET, callbacks=[blip]).fit(Net(heads=3, norm=True), datamodule=tasks, ckpt_path=path)
    assert (blip.tasks_learned, tasks.learned) == (3, 3)
    assert blip.used_capacity >= capacity


@KINDS
def test_the_state_comes_back_as_it_was(kind):
    saved = torch.load(FOLDER / f"version-{VERSION}-{kind}.ckpt", weights_only=True)
    blip, module = BLIPS[kind](), Net(heads=3, norm=True)
    module.load_state_dict(saved["state_dict"])
    blip.load_state_dict(saved["callbacks"]["BLIP"])
    blip.predicted_forgetting(module)
    expected = saved["callbacks"]["BLIP"]
    assert same(blip.state_dict(), expected)


def damages():
    """Ways to damage the state of a diagonal BLIP, by name."""

    def weight(state):
        return state["frozen"]["body.0.weight"]["state"]

    def drop(entry):
        return lambda state: state.pop(entry)

    def put(name, value):
        return lambda state: weight(state).update({name: value})

    return {
        "later version": lambda state: state.update(version=VERSION + 1),
        **{f"no {entry}": drop(entry) for entry in ("settings", "frozen", "statistics", "mean", "chosen")},
        "no position": lambda state: weight(state).pop("position"),
        "other shape": put("position", torch.zeros(3, dtype=torch.uint8)),
        "other type": put("gained", torch.zeros(16, 8)),
        "no tensor": put("position", [1, 2, 3]),
        "nan": put("gained", torch.full((16, 8), torch.nan, dtype=torch.float16)),
        "prior": put("prior", -1.0),
        "prior nan": put("prior", float("nan")),
        "bound": put("bound", "wide"),
        "tasks": put("tasks", -1),
        "unknown": put("colour", "red"),
        "too many bits": put("bits", torch.full((16, 8), 31, dtype=torch.uint8)),
        "not a state": lambda state: state.update(frozen=None),
        "counts": lambda state: state.update(tasks_learned="many"),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_state_is_refused_whole(damage):
    saved = torch.load(FOLDER / f"version-{VERSION}-diagonal.ckpt", weights_only=True)["callbacks"]["BLIP"]
    blip = BLIPS["diagonal"]()
    blip.load_state_dict(saved)
    before = blip.state_dict()
    damages()[damage](saved := copy.deepcopy(saved))
    told = r"is damaged|Parameter 'body\.0\.weight'|update lightning-blip|tasks_learned='many'"
    with pytest.raises(ValueError, match=told):
        blip.load_state_dict(saved)
    assert same(blip.state_dict(), before)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("anchor", torch.zeros(3, 3)),
        ("input_basis", torch.zeros(2, 2)),
        ("output_values", torch.full((16,), torch.inf)),
        ("prior", 0.0),
    ],
)
def test_a_damaged_layer_is_refused_whole(entry, value):
    path = FOLDER / f"version-{VERSION}-kronecker.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]["BLIP"]
    saved["frozen"]["body.0.weight"]["state"][entry] = value
    blip = BLIPS["kronecker"]()
    with pytest.raises(ValueError, match=r"Parameter 'body\.0\.weight': "):
        blip.load_state_dict(saved)
    assert same(blip.state_dict(), BLIPS["kronecker"]().state_dict())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, tmp_path):
    whole = (FOLDER / f"version-{VERSION}-diagonal.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(share * len(whole))])
    blip = BLIPS["diagonal"]()
    with pytest.raises((EOFError, OSError, RuntimeError)):
        pl.Trainer(**QUIET, callbacks=[blip]).fit(
            Net(heads=3, norm=True), datamodule=pairs(), ckpt_path=tmp_path / "cut.ckpt"
        )
    assert blip.tasks_learned == 0


def test_weights_that_were_changed_after_all_are_noticed(tmp_path):
    saved = torch.load(FOLDER / f"version-{VERSION}-diagonal.ckpt", weights_only=True)
    saved["state_dict"]["body.0.weight"] *= -1
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"'body\.0\.weight': .* frozen bits are not those that were saved"):
        pl.Trainer(**QUIET, callbacks=[BLIPS["diagonal"]()]).fit(
            Net(heads=3, norm=True), datamodule=pairs(), ckpt_path=tmp_path / "other.ckpt"
        )


class Wider(Net):
    """The same names, other shapes."""

    def __init__(self):
        super().__init__(heads=3, norm=True)
        self.body[0] = torch.nn.Linear(8, 20)
        self.body[1] = torch.nn.BatchNorm1d(20)


class Renamed(Net):
    """Other names."""

    def __init__(self):
        super().__init__(heads=3, norm=True)
        self.trunk = self.body
        del self.body


@KINDS
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Wider,
            r"'body\.0\.weight' has shape \((20, 8|20, 9)\) here, and \((16, 8|16, 9)\) in what BLIP has",
        ),
        (Renamed, r"learned about 'body\.\d\.weight', which the module does not have"),
    ],
)
def test_another_network_is_refused_by_the_first_difference(kind, module, message):
    saved = torch.load(FOLDER / f"version-{VERSION}-{kind}.ckpt", weights_only=True)
    blip = BLIPS[kind]()
    blip.load_state_dict(saved["callbacks"]["BLIP"])
    with pytest.raises(ValueError, match=message):
        pl.Trainer(**QUIET, callbacks=[blip]).fit(module(), datamodule=pairs())


def test_all_of_a_checkpoint_is_tensors_and_plain_values(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_last=True)
    pl.Trainer(**{**QUIET, "enable_checkpointing": True}, callbacks=[BLIP(), saving]).fit(
        Net(norm=True), datamodule=pairs()
    )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["BLIP"]["version"] == VERSION
    assert (tmp_path / "last.ckpt").stat().st_size < 100_000  # the data is not in it
