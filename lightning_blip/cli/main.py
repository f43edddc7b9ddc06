"""The command line ``lightning-blip``: its commands and their help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Each command imports what it needs when it runs, because torch and Lightning take seconds to import.

_LEARNING = {
    "fit": "learn a sequence of tasks, one after another, as described in a YAML file",
    "validate": "score a checkpoint on the validation data of the tasks learned so far",
    "test": "score a checkpoint on the test data of all tasks",
}
_EXAMPLE = """\
example of a FILE:
  model:
    class_path: my_package.Net           # any LightningModule
    init_args: {width: 100}
  data:                                  # or .permute_inputs, .rotate, .chain, or a subclass of it
    class_path: lightning_blip.TaskSequenceDataModule.split_classes
    init_args:
      train: {class_path: my_package.images, init_args: {train: true}}
      test: {class_path: my_package.images, init_args: {train: false}}
      classes_per_task: 2
      epochs_per_task: 10
  blip: {basis: kronecker}               # null: fine-tuning, without BLIP
  curves: {metric: val_acc}
  trainer: {default_root_dir: runs/net}

FILE can hold all options; options on the command line override those in FILE. A run writes all its options
to config.yaml in its log folder. To repeat the run: lightning-blip fit --config LOG_FOLDER/config.yaml
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: The command line without the program's name; by default that of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, *options = arguments or [""]
    if command == "demo":
        _demo(options)
    elif command in _LEARNING and not {"-h", "--help"} & set(options):
        _learn(arguments)
    else:
        chosen = vars(_parser().parse_args(arguments))
        run = chosen.pop("run")
        try:
            run(**chosen)
        except (OSError, ValueError) as error:
            raise SystemExit(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-blip",
        description="Continual learning for PyTorch Lightning by Bit-Level Information Preserving (BLIP).",
        epilog="lightning-blip COMMAND --help lists the options of a command.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, summary in _LEARNING.items():
        _describe_learning(_command(commands, name, summary, epilog=_EXAMPLE), name)
    inspect = _command(commands, "inspect", "show what is frozen in a checkpoint")
    inspect.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        help="a checkpoint that Lightning saved, or a file written by torch.save(blip.state_dict(), …)",
    )
    inspect.set_defaults(run=_inspect)
    report = _command(commands, "report", "write a page about a run, or about several runs side by side")
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="a folder with a forgetting.json in or below it"
    )
    report.add_argument("--output", type=Path, help="the page (default: report.html beside the records)")
    report.set_defaults(run=_report)
    _command(commands, "demo", "learn permuted digits without BLIP and with it, and compare the two")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, epilog: str = ""
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _describe_learning(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options that users need most to the help of a command whose options LightningCLI reads."""
    parser.usage = f"lightning-blip {command} --config FILE [--OPTION VALUE …]"
    run = parser.add_argument_group("run")
    run.add_argument(
        "-c", "--config", metavar="FILE", help="a YAML file; a later one overrides an earlier one"
    )
    resumed = "continue from this checkpoint; last: the newest of earlier runs"
    run.add_argument(
        "--ckpt_path", metavar="CKPT", help=resumed if command == "fit" else "the checkpoint to score"
    )
    run.add_argument("--seed_everything", metavar="SEED", help="the random seed; drawn if not given")
    run.add_argument("--print_config", nargs="?", help="print all options as YAML, and exit")
    learned = parser.add_argument_group("model and tasks")
    learned.add_argument(
        "--model", metavar="CLASS", help="a LightningModule; --model.NAME VALUE sets an argument of it"
    )
    learned.add_argument("--model.help", metavar="CLASS", help="list the arguments of a LightningModule")
    learned.add_argument(
        "--data",
        metavar="CLASS",
        help="a TaskSequenceDataModule, or a function that returns one; --data.NAME VALUE sets an argument",
    )
    learned.add_argument(
        "--data.help", metavar="CLASS", help="list the arguments of such a class or function"
    )
    how = parser.add_argument_group("training")
    how.add_argument(
        "--blip.NAME", metavar="VALUE", help="an argument of BLIP, such as --blip.basis kronecker"
    )
    how.add_argument("--blip", choices=["null"], help="train without BLIP: fine-tuning")
    how.add_argument("--blip.help", action="store_true", help="list the arguments of BLIP")
    how.add_argument(
        "--curves.metric", metavar="NAME", help="the metric that ForgettingCurves records (default: val_acc)"
    )
    how.add_argument(
        "--optimizer", metavar="CLASS", help="replaces the module's optimizer; --optimizer.lr VALUE"
    )
    how.add_argument("--lr_scheduler", metavar="CLASS", help="a scheduler for that optimizer")
    how.add_argument("--trainer.NAME", metavar="VALUE", help="an argument of Lightning's Trainer")
    how.add_argument("--help-all", action="store_true", help="list every option, with its type")


def _learn(arguments: list[str]) -> None:
    try:
        from lightning_blip.cli.learning import learn
    except ModuleNotFoundError as error:
        raise _missing(error, "cli") from error
    learn(["--help" if argument == "--help-all" else argument for argument in arguments])


def _demo(options: list[str]) -> None:
    try:
        from jsonargparse import auto_cli

        from lightning_blip.cli.demo import demo
    except ModuleNotFoundError as error:
        raise _missing(error, "demo") from error
    auto_cli(demo, args=options, prog="lightning-blip demo")


def _missing(error: ModuleNotFoundError, extra: str) -> SystemExit:
    return SystemExit(f"{error.name} is missing: pip install 'lightning-blip[{extra}]'")


def _inspect(checkpoint: Path) -> None:
    from lightning_blip.cli.inspection import show

    show(checkpoint)


def _report(runs: list[Path], output: Path | None) -> None:
    from lightning_blip.results.report import report

    print(f"Report: {report(runs, output)}")
