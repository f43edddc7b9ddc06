"""What a checkpoint holds of BLIP, read by later versions, and refused if it is damaged."""

import copy
import re

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_blip import BLIP
from lightning_blip.checkpoint import VERSION, upgraded
from tests.golden.write import BLIPS, FOLDER
from tests.helpers.fitting import fit, same
from tests.helpers.networks import Net, pairs

each_kind = pytest.mark.parametrize("kind", BLIPS)
each_version = pytest.mark.parametrize("version", range(1, VERSION + 1))


def golden(kind, version=VERSION):
    """Return the checkpoint that a version wrote."""
    return torch.load(FOLDER / f"version-{version}-{kind}.ckpt", weights_only=True)


@each_kind
def test_every_version_up_to_the_current_one_has_a_checkpoint(kind):
    versions = [golden(kind, version)["callbacks"]["BLIP"]["version"] for version in (1, 2)]
    assert versions == list(range(1, VERSION + 1))


@each_kind
@each_version
def test_a_fit_resumes_from_a_checkpoint_of_every_version(version, kind):
    path = FOLDER / f"version-{version}-{kind}.ckpt"
    blip, tasks = BLIPS[kind](), pairs()
    blip.load_state_dict(golden(kind, version)["callbacks"]["BLIP"])
    assert blip.tasks_learned == 2
    capacity = blip.used_capacity
    assert 0 < capacity < 1
    fit(blip, Net(heads=3, norm=True), tasks, ckpt_path=path)
    assert (blip.tasks_learned, tasks.learned) == (3, 3)
    assert blip.used_capacity >= capacity


@each_kind
@each_version
def test_a_state_of_every_version_is_saved_again_unchanged_in_the_current_form(version, kind):
    saved = golden(kind, version)
    blip, module = BLIPS[kind](), Net(heads=3, norm=True)
    module.load_state_dict(saved["state_dict"])
    blip.load_state_dict(saved["callbacks"]["BLIP"])
    blip.predicted_forgetting(module)
    assert same(blip.state_dict(), upgraded(saved["callbacks"]["BLIP"]))


@each_kind
def test_the_current_form_is_not_changed_when_it_is_read(kind):
    saved = golden(kind)["callbacks"]["BLIP"]
    assert same(upgraded(saved), saved)


@each_kind
def test_every_value_of_version_1_is_in_the_current_form(kind):
    saved = golden(kind, version=1)["callbacks"]["BLIP"]
    now = upgraded(saved)["frozen"]
    before = {**saved["frozen"]["parameters"], **saved["frozen"]["layers"]}
    assert now.keys() == before.keys()
    assert now
    for name, values in before.items():
        state = now[name]["state"]
        flat = {**state, **state["freezing"], **state["pace"]}
        assert values.keys() <= flat.keys()
        assert all(same(flat[entry], value) for entry, value in values.items())


def damages():
    """Return ways to damage the state of a diagonal BLIP and what the error names, by what is wrong."""

    def weight(state):
        return state["frozen"]["body.0.weight"]["state"]

    def drop(entry):
        return lambda state: state.pop(entry)

    def put(name, value):
        return lambda state: weight(state).update({name: value})

    later = f"version {VERSION + 1} of what BLIP learned, this is version {VERSION}: update lightning-blip"
    parts = ("settings", "frozen", "statistics", "mean", "chosen")
    damaged, of_weight = "What the checkpoint holds of BLIP is damaged", "Parameter 'body.0.weight': "
    return {
        "later version": (lambda state: state.update(version=VERSION + 1), later),
        **{
            f"no {part}": (drop(part), f"{damaged}, nothing of it was loaded: {KeyError(part)!r}")
            for part in parts
        },
        "no position": (
            lambda state: weight(state).pop("position"),
            f"{damaged}, nothing of it was loaded: {KeyError('position')!r}",
        ),
        "other shape": (
            put("position", torch.zeros(3, dtype=torch.uint8)),
            f"{of_weight}position should be torch.uint8 of shape (16, 8), and is torch.uint8 of shape (3,)",
        ),
        "other type": (
            put("gained", torch.zeros(16, 8)),
            f"{of_weight}gained should be torch.float16 of shape (16, 8), and is torch.float32",
        ),
        "no tensor": (
            put("position", [1, 2, 3]),
            f"{of_weight}position should be torch.uint8 of shape (16, 8), and is [1, 2, 3]",
        ),
        "nan": (
            put("gained", torch.full((16, 8), torch.nan, dtype=torch.float16)),
            f"{of_weight}gained has values that are not finite",
        ),
        "negative prior": (put("prior", -1.0), f"{of_weight}prior=-1.0 should be a number from"),
        "prior nan": (put("prior", float("nan")), f"{of_weight}prior=nan should be a number from"),
        "bound": (put("bound", "wide"), f"{of_weight}bound='wide' should be a number from"),
        "tasks": (put("tasks", -1), f"{of_weight}tasks=-1 should be a number from 0"),
        "unknown": (put("colour", "red"), "'colour'"),
        "too many bits": (
            put("bits", torch.full((16, 8), 31, dtype=torch.uint8)),
            f"{of_weight}bits has more than max_bits=20",
        ),
        "not a state": (
            lambda state: state.update(frozen=None),
            "'NoneType' object has no attribute 'items'",
        ),
        "counts": (
            lambda state: state.update(tasks_learned="many"),
            "tasks_learned='many' should be a number from 0",
        ),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    saved = golden("diagonal")["callbacks"]["BLIP"]
    blip = BLIPS["diagonal"]()
    blip.load_state_dict(saved)
    before = blip.state_dict()
    do_damage, message = damages()[damage]
    do_damage(saved := copy.deepcopy(saved))
    with pytest.raises(ValueError, match=re.escape(message)):
        blip.load_state_dict(saved)
    assert same(blip.state_dict(), before)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("anchor", torch.zeros(3, 3), "input_basis should be torch.float32 of shape (3, "),
        ("input_basis", torch.zeros(2, 2), "input_basis should be torch.float32 of shape (9, 9), and is"),
        ("output_values", torch.full((16,), torch.inf), "output_values has values that are not finite"),
        ("prior", 0.0, "prior=0.0 should be a number from"),
    ],
)
def test_a_damaged_state_of_the_kronecker_basis_is_refused_and_changes_nothing(entry, value, message):
    saved = golden("kronecker")["callbacks"]["BLIP"]
    saved["frozen"]["body.0.weight"]["state"][entry] = value
    blip = BLIPS["kronecker"]()
    with pytest.raises(ValueError, match=re.escape(f"Parameter 'body.0.weight': {message}")):
        blip.load_state_dict(saved)
    assert same(blip.state_dict(), BLIPS["kronecker"]().state_dict())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, tmp_path):
    whole = (FOLDER / f"version-{VERSION}-diagonal.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(share * len(whole))])
    blip = BLIPS["diagonal"]()
    # The message depends on the version of torch and on the file system.
    with pytest.raises((EOFError, OSError, RuntimeError)) as raised:
        fit(blip, Net(heads=3, norm=True), ckpt_path=tmp_path / "cut.ckpt")
    assert any(frame.path.parts[-2:] == ("torch", "serialization.py") for frame in raised.traceback)
    assert blip.tasks_learned == 0


@each_version
def test_weights_changed_since_they_were_saved_are_refused(version, tmp_path):
    saved = golden("diagonal", version)
    saved["state_dict"]["body.0.weight"] *= -1
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"'body\.0\.weight': .* frozen bits are not those that were saved"):
        fit(BLIPS["diagonal"](), Net(heads=3, norm=True), ckpt_path=tmp_path / "other.ckpt")


class Wider(Net):
    """A network with the same names and other shapes."""

    def __init__(self):
        super().__init__(heads=3, norm=True)
        self.body[0] = torch.nn.Linear(8, 20)
        self.body[1] = torch.nn.BatchNorm1d(20)


class Renamed(Net):
    """A network with other names."""

    def __init__(self):
        super().__init__(heads=3, norm=True)
        self.trunk = self.body
        del self.body


@each_kind
@each_version
@pytest.mark.parametrize("module", [Wider, Renamed])
def test_another_network_is_refused_with_its_first_difference(module, version, kind):
    name, here, learned = "body.0.weight", (20, 8), (16, 8)
    if kind == "kronecker":
        # The bias counts as one more input. Version 1 saved layers behind all other parameters.
        name, here, learned = (name, (20, 9), (16, 9)) if version > 1 else ("body.1.weight", (20,), (16,))
    message = {
        Wider: f"{name!r} has shape {here} here, and {learned} in what BLIP has learned",
        Renamed: f"learned about {name!r}, which the module does not have",
    }[module]
    blip = BLIPS[kind]()
    blip.load_state_dict(golden(kind, version)["callbacks"]["BLIP"])
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(blip, module())


def test_a_checkpoint_holds_tensors_and_plain_values_and_no_data(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_last=True)
    fit([BLIP(), saving], Net(norm=True), enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["BLIP"]["version"] == VERSION
    assert (tmp_path / "last.ckpt").stat().st_size < 100_000  # so the data is not in it
