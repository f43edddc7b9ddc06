"""Two processes with gloo: each sees a part of the samples, and both learn what one process would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_blip.trainer import processes


def start(module, *arguments):
    """Run a script that starts the other process itself."""
    script = [sys.executable, "-m", f"tests.processes.{module}", *map(str, arguments)]
    environment = {**os.environ, "MASTER_PORT": str(20_000 + os.getpid() % 20_000)}
    environment.pop("LOCAL_RANK", None)  # left by an earlier test, it would keep the other from starting
    done = subprocess.run(
        script, capture_output=True, text=True, env=environment, timeout=300, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-3000:]


def learn(folder, count, *arguments):
    """Return the results of each of ``count`` processes after a small stream."""
    start("run", folder, count, *arguments)
    return [torch.load(folder / f"{count}-{rank}.pt") for rank in range(count)]


@pytest.mark.parametrize(
    ("basis", "heads", "norm", "strengths"),
    [
        ("diagonal", "shared", "plain", "given"),
        ("kronecker", "heads", "plain", "chosen"),
        ("diagonal", "heads", "norm", "chosen"),
    ],
)
def test_two_processes_freeze_the_same_bits_as_each_other_and_as_one(tmp_path, basis, heads, norm, strengths):
    first, second = learn(tmp_path, 2, basis, heads, norm, strengths)
    for part in ("weights", "bits", "precision"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part]), part
    assert first["chosen"] == second["chosen"]
    assert not torch.equal(first["samples"], second["samples"])
    if norm == "norm":  # each process normalises by its part of a batch, unlike one process
        return
    (alone,) = learn(tmp_path, 1, basis, heads, norm, strengths)
    together = torch.cat([first["samples"], second["samples"]])
    assert sorted(together.flatten().tolist()) == sorted(alone["samples"].flatten().tolist())
    for name, bits in alone["bits"].items():
        assert torch.equal(first["bits"][name], bits), name
        torch.testing.assert_close(first["precision"][name], alone["precision"][name], rtol=1e-3, atol=0)
    # In the Kronecker basis rounding decides on the eigenvectors without information, and so on their walls.
    if basis == "diagonal":
        for name, theta in alone["weights"].items():
            torch.testing.assert_close(first["weights"][name], theta, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first["matrix"], alone["matrix"], equal_nan=True)


def test_two_processes_play_different_environments_and_learn_the_same(tmp_path):
    start("play", tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    noise = [results["whole"]["first"][..., 2] for results in (first, second)]
    assert noise[0].unique().numel() == noise[1].unique().numel() == noise[0].numel()
    assert not set(noise[0].flatten().tolist()) & set(noise[1].flatten().tolist())
    assert first["whole"]["steps"] == first["resumed"]["steps"] == 96
    for part in ("weights", "bits", "precision"):
        expected = first["whole"][part]
        for other in (second["whole"], first["resumed"], second["resumed"]):
            assert all(torch.equal(expected[name], other[part][name]) for name in expected), part
    matrix = first["whole"]["matrix"]
    assert matrix.tril().isfinite().all()
    for other in (second["whole"], first["resumed"], second["resumed"]):
        assert torch.equal(matrix.tril(), other["matrix"].tril())
        assert first["whole"]["chosen"] == other["chosen"]


def test_a_single_process_exchanges_nothing():
    value = torch.tensor([1.0])
    assert processes.average(value) is value
    processes.share_buffers(torch.nn.BatchNorm1d(1))
    assert processes.gathered(value) == [value]
