"""The memory that BLIP takes, in training and in checkpoints."""

import copy
import gc
import io

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_blip import BLIP, FrozenBitsOptimizer
from tests.helpers.fitting import fit
from tests.helpers.networks import Net


def reachable_bytes(*roots, apart_from):
    """Return the bytes of all tensors that the roots refer to and the others do not."""
    seen = {id(one) for one in everything_in(*apart_from)}
    storages = {
        one.untyped_storage().data_ptr() for one in everything_in(*apart_from) if isinstance(one, Tensor)
    }
    found = {}
    for one in everything_in(*roots, seen=seen):
        if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in storages:
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(found.values())


def everything_in(*roots, seen=None):
    """Return all objects that the roots refer to, directly or not, except for those already seen."""
    seen = set() if seen is None else seen
    waiting, found = list(roots), []
    while waiting:
        one = waiting.pop()
        # Follow data and not code, because modules and classes refer to everything.
        if id(one) in seen or isinstance(one, type) or type(one).__name__ in ("module", "function"):
            continue
        seen.add(id(one))
        found.append(one)
        waiting.extend(gc.get_referents(one))
        waiting.extend(vars(one).values() if isinstance(one, Tensor) else ())
    return found


def train(blip, optimizer, network, tasks, steps=3):
    """Learn tasks of random data; return the wrapped optimizer and the number of parameters."""
    values = sum(theta.numel() for theta in network.parameters())
    wrapped = blip.wrap(optimizer, network)
    for _ in range(tasks):
        x, y = torch.randn(40, 30), torch.randint(0, 10, (40,))
        for _ in range(steps):
            wrapped.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            wrapped.step()
        blip.consolidate(network, [(x, y)])
    return wrapped, values


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("make", [BLIP, BLIP.paper])
def test_training_takes_six_bytes_per_parameter_beside_the_weights(make, name, small, monkeypatch):
    if not small:
        monkeypatch.setattr("lightning_blip.frozen.fused.CHUNK", 1)
        monkeypatch.setattr("lightning_blip.frozen.fused.Compiled.__call__", lambda *arguments: False)
    network = nn.Linear(30, 10)
    optimizer = getattr(torch.optim, name)(network.parameters(), lr=0.01)
    blip = make()
    wrapped, values = train(blip, optimizer, network, tasks=2)
    for state in map(blip.state, blip.bits()):
        state.pace.total = 100  # the next step has no pull, and uses the walls
    wrapped.step()
    other = (network, optimizer.param_groups, optimizer.state)
    # Walls are stored for small networks only, where they take 2 MiB at most.
    assert reachable_bytes(blip, wrapped, apart_from=other) == (6 + 8 * small) * values


def test_a_checkpoint_takes_three_bytes_per_parameter_for_any_number_of_tasks():
    network = nn.Sequential(nn.Linear(30, 400), nn.ReLU(), nn.Linear(400, 10))
    blip = BLIP()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for task in range(50):
        _, values = train(blip, optimizer, network, tasks=1, steps=1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        file = io.BytesIO()
        torch.save(blip.state_dict(), file)
        file.seek(0)
        tensors = [
            one for one in everything_in(torch.load(file, weights_only=True)) if isinstance(one, Tensor)
        ]
        assert sum(one.nbytes for one in tensors) == 3 * values
        if task:
            assert len(file.getvalue()) <= 3 * values + 8_000
    assert blip.tasks_learned == 50
    assert blip.used_capacity > 0


def test_a_restored_state_that_is_saved_before_it_sees_the_weights_loses_nothing():
    network = nn.Linear(30, 10)
    blip = BLIP(prior=1e-4)
    train(blip, torch.optim.SGD(network.parameters(), lr=0.5), network, tasks=2)
    restored = BLIP(prior=1e-4)
    restored.load_state_dict(copy.deepcopy(blip.state_dict()))
    assert restored.used_capacity == blip.used_capacity > 0
    again = BLIP(prior=1e-4)
    again.load_state_dict(restored.state_dict())
    again.wrap(torch.optim.SGD(network.parameters(), lr=0.5), network)
    for name in blip.bits():
        frozen = blip.state(name)
        assert torch.equal(again.state(name).packed, frozen.packed)
        assert torch.equal(again.state(name).gained, frozen.gained)


def test_weights_of_another_checkpoint_are_refused(tmp_path):
    blip = BLIP(prior=1e-4)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit([blip, checkpoint], enable_checkpointing=True)
    assert any((bits > 0).any() for bits in blip.bits().values())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    other = BLIP(prior=1e-4)
    other.load_state_dict(saved["callbacks"]["BLIP"])
    torch.manual_seed(3)
    with pytest.raises(
        ValueError, match=r"'body\.0\.weight'.*load the module's weights from the same checkpoint"
    ):
        other.wrap(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), Net())
    module = Net()
    module.load_state_dict(saved["state_dict"])
    other.wrap(torch.optim.SGD(module.parameters(), lr=0.1), module)


def test_a_blip_holds_no_optimizer_after_a_fit():
    blip = BLIP(prior=1e-4)
    trainer = fit(blip)
    assert any(isinstance(one, FrozenBitsOptimizer) for one in trainer.strategy.optimizers)
    # Lightning gives every callback the module's methods for logging, which lead to the Trainer.
    held = everything_in(blip, seen={id(vars(blip)["log"]), id(vars(blip)["log_dict"])})
    assert any(one is blip.state("body.0.weight") for one in held)
    assert not any(isinstance(one, torch.optim.Optimizer) for one in held)
