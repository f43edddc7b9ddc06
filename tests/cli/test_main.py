"""The command line: each command does the same as a script, and errors are reported in a sentence."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch import nn
from torch.utils.data import TensorDataset

import lightning_blip
from lightning_blip import BLIP, ForgettingCurves, TaskSequenceDataModule
from lightning_blip.cli import main as cli
from tests.helpers.fitting import fit, same
from tests.helpers.networks import Net

SAMPLES = {
    "train": {"class_path": "tests.helpers.networks.blobs"},
    "test": {"class_path": "tests.helpers.networks.blobs", "init_args": {"seed": 1}},
}
CONFIG = {
    "seed_everything": 0,
    "model": {"class_path": "tests.helpers.networks.Net", "init_args": {"heads": 3}},
    "data": {
        "class_path": "lightning_blip.TaskSequenceDataModule.split_classes",
        "init_args": {**SAMPLES, "epochs_per_task": 2, "batch_size": 16},
    },
    "blip": {"basis": "kronecker"},
    "trainer": {
        "accelerator": "cpu",
        "logger": {
            "class_path": "pytorch_lightning.loggers.CSVLogger",
            "init_args": {"save_dir": ".", "name": "logs"},
        },
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


class Turned(TaskSequenceDataModule):
    """A user's subclass, which makes its tasks itself."""

    def __init__(self, angles: list[float], batch_size: int = 4) -> None:
        tasks = TaskSequenceDataModule.rotate(images(), images(), degrees=angles).tasks
        super().__init__(tasks, batch_size=batch_size)


def images(side: int = 4) -> TensorDataset:
    return TensorDataset(torch.rand(8, 1, side, side), torch.arange(8) % 2)


class OfImages(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU())


class Dying(pl.Callback):
    """Ends a run during its second task, as a power cut would."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 3 and batch_idx == 1:
            raise KeyError("power")


def run(command, *options, **changes):
    """Run a command with CONFIG and changes to it; return the log folder that the command made."""
    Path("config.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
    before = set(Path("logs").glob("*"))
    cli.main([command, "--config", "config.yaml", *options])
    new = set(Path("logs").glob("*")) - before
    return max(new, default=None)


def saved(log_folder):
    (path,) = log_folder.rglob("*.ckpt")
    return torch.load(path, weights_only=True)


def record(log_folder):
    return json.loads((log_folder / "forgetting.json").read_text())


def same_run(one, other):
    assert same(saved(one)["state_dict"], saved(other)["state_dict"])
    assert record(one)["matrix"] == record(other)["matrix"]
    assert record(one)["settings"]["blip"] == record(other)["settings"]["blip"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Return the log folder of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("learned"))
        return run("fit").resolve()


def test_fit_trains_the_same_network_as_a_script(learned):
    pl.seed_everything(0, verbose=False)
    blip, curves, module = BLIP(basis="kronecker"), ForgettingCurves(), Net(heads=3)
    fit([blip, curves], module)
    assert same(saved(learned)["state_dict"], dict(module.state_dict()))
    nan_as_null = [[None if score != score else score for score in row] for row in curves.matrix.tolist()]
    assert record(learned)["matrix"] == nan_as_null


def test_the_saved_configuration_repeats_the_run(learned):
    before = set(Path("logs").glob("*"))
    cli.main(["fit", "--config", str(learned / "config.yaml")])
    (again,) = set(Path("logs").glob("*")) - before
    same_run(again, learned)


def test_a_seed_that_was_drawn_is_saved():
    first = run("fit", seed_everything=True)
    assert type(yaml.safe_load((first / "config.yaml").read_text())["seed_everything"]) is int
    cli.main(["fit", "--config", str(first / "config.yaml")])
    same_run(first, *(set(Path("logs").glob("*")) - {first}))


def test_options_on_the_command_line_override_the_file():
    folder = run("fit", "--blip.basis=diagonal", "--blip.prior", "1e-3", "--data.epochs_per_task", "1")
    settings = record(folder)["settings"]
    assert settings["blip"]["basis"] == "diagonal"
    assert settings["chosen"]["prior"] == 1e-3
    assert settings["stream"]["epochs"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "recorded"), [(["--blip", "null"], True), (["--blip=null", "--curves=null"], False)]
)
def test_null_leaves_a_callback_out(options, recorded, learned):
    assert {"BLIP", "ForgettingCurves"} <= saved(learned)["callbacks"].keys()
    folder = run("fit", *options)
    callbacks = saved(folder)["callbacks"]
    assert "BLIP" not in callbacks
    assert ("ForgettingCurves" in callbacks) == recorded
    assert (folder / "forgetting.json").exists() == recorded


def test_the_settings_of_the_paper_can_be_chosen():
    folder = run("fit", blip={"class_path": "lightning_blip.BLIP.paper", "init_args": {"prior": 1e-12}})
    assert record(folder)["settings"]["blip"]["rule"] == "paper"
    assert record(folder)["settings"]["chosen"]["prior"] == pytest.approx(1e-8)


def test_the_optimizer_can_be_chosen():
    folder = run("fit", "--optimizer", "torch.optim.Adam", "--optimizer.lr", "0.02")
    (group,) = saved(folder)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.02
    assert "betas" in group


def test_an_optimizer_and_a_schedule_start_anew_with_each_task():
    chosen = ("--optimizer", "torch.optim.Adam", "--optimizer.lr", "0.02")
    schedule = ("--lr_scheduler", "torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size", "1")
    checkpoint = saved(run("fit", *chosen, *schedule))
    steps = {float(state["step"]) for state in checkpoint["optimizer_states"][0]["state"].values()}
    assert steps == {6.0}  # two epochs of three batches: those of one task
    assert checkpoint["lr_schedulers"][0]["last_epoch"] <= 2
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.02


@pytest.mark.parametrize(
    ("maker", "arguments", "names"),
    [
        ("split_classes", {**SAMPLES, "classes_per_task": 3}, ["0-1-2", "3-4-5"]),
        ("permute_inputs", {**SAMPLES, "tasks": 2, "seed": 3}, ["permutation 0", "permutation 1"]),
        ("chain", {"datasets": [list(SAMPLES.values())] * 2, "names": ["one", "two"]}, ["one", "two"]),
        (
            "rotate",
            {
                "train": {"class_path": "tests.cli.test_main.images"},
                "test": {"class_path": "tests.cli.test_main.images"},
                "degrees": [0, 90],
                "val_fraction": 0.5,
            },
            ["0°", "90°"],
        ),
        (None, {"angles": [0.0, 45.0]}, ["0°", "45°"]),
    ],
)
def test_every_way_to_make_a_sequence_can_be_chosen(maker, arguments, names):
    path = "tests.cli.test_main.Turned" if maker is None else f"lightning_blip.TaskSequenceDataModule.{maker}"
    of_images = maker in ("rotate", None)
    model = {"class_path": "tests.cli.test_main.OfImages" if of_images else "tests.helpers.networks.Net"}
    folder = run("fit", data={"class_path": path, "init_args": arguments}, model=model)
    assert record(folder)["tasks"] == names
    assert set(record(folder)["settings"]["stream"]["epochs"]) == {1}


@pytest.mark.parametrize("root", [".", "runs"])
def test_last_continues_a_run_that_was_interrupted(root, learned):
    trainer = {**deepcopy(CONFIG["trainer"]), "default_root_dir": root}
    trainer["logger"]["init_args"]["save_dir"] = root
    dying = {**trainer, "callbacks": [{"class_path": "tests.cli.test_main.Dying"}]}
    with pytest.raises(KeyError, match="power"):
        run("fit", trainer=dying)
    first = {path.name for path in Path(root, "logs").glob("*")}
    assert first == {"version_0"}
    run("fit", "--ckpt_path", "last", trainer=trainer)
    same_run(Path(root, "logs", "version_1"), learned)
    # Without a checkpoint, the run starts from the beginning.
    empty = {**trainer, "default_root_dir": "empty"}
    run("fit", "--ckpt_path=last", trainer=empty)
    same_run(Path(root, "logs", "version_2"), learned)


def test_last_is_the_checkpoint_in_the_folder_of_a_checkpoint_callback(learned):
    kept = {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint"}
    kept["init_args"] = {"dirpath": "mine", "save_last": True}
    trainer = {**CONFIG["trainer"], "callbacks": [kept]}
    short = {**trainer, "max_epochs": 3}
    run("fit", trainer=short)
    run("fit", trainer=CONFIG["trainer"])  # a newer checkpoint, of another run
    folder = run("fit", "--ckpt_path", "last", trainer=trainer)
    assert record(folder)["matrix"] == record(learned)["matrix"]
    assert record(folder)["scores"] == record(learned)["scores"]


@pytest.mark.parametrize(("command", "score", "tasks"), [("validate", "val_acc", 2), ("test", "test_acc", 3)])
def test_checkpoints_are_scored_on_the_tasks_of_the_command(command, score, tasks, capsys):
    folder = run("fit", "--trainer.max_epochs", "2")
    (checkpoint,) = folder.rglob("*.ckpt")
    capsys.readouterr()
    run(command, "--ckpt_path", str(checkpoint))
    # The first task is learned, and the second is current.
    printed = capsys.readouterr().out
    assert score in printed
    assert len(re.findall(r"DataLoader \d", printed)) == tasks


def test_the_printed_configuration_can_be_run(capsys, learned):
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--config", "config.yaml", "--blip.max_bits=12", "--print_config"])
    assert end.value.code in (None, 0)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["blip"]["init_args"]["max_bits"] == 12
    assert printed["blip"]["init_args"]["basis"] == "kronecker"
    assert run("fit", **printed) is not None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--blip.basis", "cubic"], "cubic"),
        (["--blip.nothing", "1"], "nothing"),
        (["--data", "nowhere.Tasks"], "nowhere"),
        (["--data.train", "tests.helpers.networks.Net"], "train"),
    ],
)
def test_an_error_names_the_wrong_option(options, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("fit", *options)
    _, error, message = capsys.readouterr().err.rpartition("error:")
    assert error
    assert named in message


def test_help_imports_no_heavy_library():
    for arguments in (["--help"], ["fit", "--help"], ["report", "--help"]):
        code = f"""
import sys
from lightning_blip.cli.main import main
try:
    main({arguments})
except SystemExit as end:
    assert not end.code
assert not {{"torch", "pytorch_lightning", "rich", "jsonargparse"}} & sys.modules.keys()
"""
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(cli.__file__).parents[2]
        )


def help_text(capsys, *arguments):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*arguments])
    return capsys.readouterr().out


def test_help_is_short_and_names_all_commands(capsys):
    printed = help_text(capsys, "--help")
    for command in ("fit", "validate", "test", "inspect", "report", "demo"):
        assert re.search(rf"^ +{command} ", printed, re.MULTILINE)
        assert help_text(capsys, command, "--help").count("\n") < 60
    for setting in ("--tasks", "--basis", "--seed"):
        assert setting in help_text(capsys, "demo", "--help")


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_the_options_that_help_names_exist(command, capsys):
    short, whole = help_text(capsys, command, "--help"), help_text(capsys, command, "--help-all")
    options = set(re.findall(r"^ +(?:-c FILE, )?--([a-z_.]+)", short, re.MULTILINE))
    assert {"config", "ckpt_path", "model", "data", "blip", "curves.metric", "trainer."} <= options
    for option in options:
        whole_name = option.removesuffix(".").replace("curves.metric", "curves")
        assert f"--{whole_name} " in whole
    assert "--blip.max_bits" in help_text(capsys, command, "--blip.help")
    assert "--curves.metric" in help_text(capsys, command, "--curves.help")
    assert "--trainer.accelerator" in whole


def test_the_example_in_the_help_can_be_run(capsys):
    example = help_text(capsys, "fit", "--help").partition("example of a FILE:\n")[2].partition("\n\n")[0]
    shown = yaml.safe_load(example)
    assert shown.keys() <= CONFIG.keys() | {"curves"}
    shown["model"] = CONFIG["model"]
    shown["data"]["init_args"] |= SAMPLES | {"epochs_per_task": 1}
    shown["trainer"] |= CONFIG["trainer"]
    assert record(run("fit", **shown))["settings"]["blip"]["basis"] == "kronecker"


@pytest.mark.parametrize(("command", "extra"), [("demo", "demo"), ("fit", "cli")])
def test_a_missing_extra_is_named_in_the_error(command, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "lightning_blip.cli.learning", raising=False)
    with pytest.raises(
        SystemExit, match=rf"jsonargparse is missing: pip install 'lightning-blip\[{extra}\]'"
    ):
        cli.main([command])


def test_fit_needs_no_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run("fit") is not None


def test_a_short_demo_prints_tables_and_draws_a_picture(tmp_path, capsys):
    cli.main(["demo", "--tasks=2", "--epochs=5", "--hidden=20", "--output=out"])
    printed = capsys.readouterr().out
    assert "R of fine-tuning" in printed
    assert "R of BLIP" in printed
    rows = re.findall(r"│ (fine-tuning|BLIP) +│ +([\d.]+) │ +([-+][\d.]+) │", printed)
    assert [name for name, _, _ in rows] == ["fine-tuning", "BLIP"]
    assert all(50 < float(score) <= 100 for _, score, _ in rows)
    for picture in ("demo.png", "BLIP/forgetting.png", "fine-tuning/forgetting.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_report_writes_a_page(learned, capsys):
    cli.main(["report", str(learned), "--output", "page.html"])
    assert "page.html" in capsys.readouterr().out
    assert "<html" in Path("page.html").read_text()
    with pytest.raises(SystemExit, match="nowhere"):
        cli.main(["report", "nowhere"])


def test_main_reads_the_command_line_of_the_process_by_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-blip", "report", "--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "RUN_DIR" in capsys.readouterr().out


def test_the_package_has_its_public_names():
    assert "BLIP" in lightning_blip.__all__
    for name in lightning_blip.__all__:
        assert name in dir(lightning_blip)
        assert getattr(lightning_blip, name).__name__ == name
    with pytest.raises(AttributeError, match="'lightning_blip' has no attribute 'BLOP'"):
        lightning_blip.BLOP  # noqa: B018
