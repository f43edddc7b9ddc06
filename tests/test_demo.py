"""The demo and the command line."""

import re
import sys

import pytest

from lightning_blip import cli


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lightning-blip", *arguments])
    cli.main()


def test_a_short_demo_prints_tables_and_draws_a_picture(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "demo", "--tasks=2", "--epochs=5", "--hidden=20", f"--output={tmp_path}")
    printed = capsys.readouterr().out
    assert "R of fine-tuning" in printed
    assert "R of BLIP" in printed
    rows = re.findall(r"│ (fine-tuning|BLIP) +│ +([\d.]+) │ +([-+][\d.]+) │", printed)
    assert [name for name, _, _ in rows] == ["fine-tuning", "BLIP"]
    assert all(50 < float(score) <= 100 for _, score, _ in rows)
    for picture in ("demo.png", "BLIP/forgetting.png", "fine-tuning/forgetting.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_help_tells_the_settings(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "demo", "--help")
    printed = capsys.readouterr().out
    for setting in ("--tasks", "--basis", "--seed"):
        assert setting in printed


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=r"jsonargparse is missing: pip install 'lightning-blip\[demo\]'"):
        run(monkeypatch, "demo")
