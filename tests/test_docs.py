"""The code blocks of the README and of the site run, and the site builds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_yaml(example):
    """Check that a block is valid YAML."""
    yaml.safe_load(example.parsed)


def written_to(name):
    """Return a function that writes a block to the file that its title names."""

    def write(example):
        Path(name).write_text(example.parsed)

    return write


def run_in_shell(example):
    """Run a block with bash; return its output if it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euc", example.parsed], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    return f"{done.stdout}\n{done.stderr}" if done.returncode else None


BLOCKS = Sybil(
    [
        PythonCodeBlockParser(),
        *(
            CodeBlockParser(f'{language} title="{name}"', written_to(name))
            for language, name in (("python", "learn.py"), ("python", "mine.py"), ("yaml", "digits.yaml"))
        ),
        CodeBlockParser("yaml", read_yaml),
        CodeBlockParser("bash", run_in_shell),
        SkipParser(),
    ]
)


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch):
    """Set the environment of the programs that the blocks start."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    random_state = torch.random.get_rng_state()
    document = BLOCKS.parse(page)
    examples = list(document.examples())
    for language in ("python", "yaml", "bash"):
        fences = sum(line.strip().startswith(f"```{language}") for line in document.text.splitlines())
        found = sum(document.text.startswith(f"```{language}", example.start) for example in examples)
        assert found == fences, f"{fences} blocks of {language}, {found} of which are read"
    for example in examples:
        example.evaluate()
    torch.random.set_rng_state(random_state)


def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "api" / "index.html").read_text()
    import lightning_blip

    for name in lightning_blip.__all__:
        assert f'id="lightning_blip.{name}"' in text
