"""An estimate restores the module and the random numbers, also after an error."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import distributions as D
from torch import nn

from lightning_blip.fisher import diagonal_fisher
from tests.fisher.networks import Apply
from tests.helpers.fitting import same


class Counter(nn.Module):
    """Counts its calls in two buffers: one changed in place, one replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.in_place += 1
        self.replaced = self.replaced + 1
        return x


def network():
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        Counter(),
        nn.Linear(32, 3),
    )
    made[1].eval()
    made[5].eval()
    made[6].bias.requires_grad_(False)
    made(torch.randn(4, 1, 6, 6)).sum().backward()
    return made


def noisy(batches):
    for batch in batches:
        torch.rand(3)  # as a loader does that augments its samples
        yield batch


def state(module):
    return {
        "buffers": {name: (id(b), b.clone()) for name, b in module.named_buffers()},
        "parameters": {name: (p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()},
        "grads": {
            n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in module.named_parameters()
        },
        "modes": [part.training for part in module.modules()],
        "hooks": [len(part._forward_hooks) for part in module.modules()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "validation": D.Distribution._validate_args,
    }


def fail(_):
    raise KeyError("stopped")


class Stopping:
    def __iter__(self):
        yield torch.randn(4, 1, 6, 6), None
        torch.rand(2)
        raise KeyError("the data")


GOOD = [(torch.randn(4, 1, 6, 6), None)] * 2


@pytest.mark.parametrize(
    ("batches", "options", "error"),
    [
        (GOOD, {}, None),
        (GOOD, {"likelihood": "gaussian"}, None),
        (GOOD, {"likelihood": lambda out: D.Poisson(out.exp())}, None),
        (GOOD, {"likelihood": fail}, KeyError),
        (GOOD, {"progress": fail}, KeyError),
        ([*GOOD, (torch.full((4, 1, 6, 6), torch.nan), None)], {}, FloatingPointError),
        ([*GOOD, (torch.randn(4, 2, 6, 6), None)], {}, RuntimeError),
        (Stopping(), {}, KeyError),
    ],
)
@pytest.mark.parametrize("grad_mode", [True, False])
def test_the_module_and_the_random_numbers_are_restored(batches, options, error, grad_mode):
    module = network()
    before = copy.deepcopy(state(module))
    before["buffers"] = state(module)["buffers"]
    before["grads"] = state(module)["grads"]
    with torch.set_grad_enabled(grad_mode):
        if error is None:
            fisher = diagonal_fisher(module, noisy(batches), **options)
            assert fisher["6.weight"].max() > 0
        else:
            with pytest.raises(error):
                diagonal_fisher(module, noisy(batches), **options)
        assert torch.is_grad_enabled() == grad_mode
    after = state(module)
    assert [key for key in before if not same(before[key], after[key])] == []


def test_the_comparison_of_states_sees_differences():
    module = network()
    before = state(module)
    module[5](torch.zeros(1))
    module[0].train(False)
    torch.rand(1)
    differ = {key for key, value in state(module).items() if not same(before[key], value)}
    assert differ == {"buffers", "modes", "random"}


def test_the_estimate_is_made_in_evaluation_mode():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(5, 3), torch.randn(8, 5)
    module = nn.Sequential(nn.Dropout(0.5), layer, nn.BatchNorm1d(3, affine=False, eps=0)).train()
    found = diagonal_fisher(module, [(inputs, None)])
    assert torch.equal(found["1.weight"], diagonal_fisher(layer, [(inputs, None)])["weight"])


def test_an_outer_inference_mode_changes_nothing():
    module, batch = nn.Linear(5, 3), (torch.randn(8, 5), None)
    with torch.inference_mode():
        found = diagonal_fisher(module, [batch])
    assert torch.equal(found["weight"], diagonal_fisher(module, [batch])["weight"])
    assert not found["weight"].is_inference()


def test_an_outer_autocast_changes_nothing():
    module, batch = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(8, 5), None)
    with torch.autocast("cpu", torch.bfloat16):
        found = diagonal_fisher(module, [batch])
    assert torch.equal(found["0.weight"], diagonal_fisher(module, [batch])["0.weight"])


def test_the_result_has_no_graph():
    module = nn.Sequential(nn.Linear(5, 4), Apply(torch.tanh), nn.LayerNorm(4))
    tied = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    tied[2].weight = tied[0].weight
    for network in (module, tied):
        found = diagonal_fisher(network, [(torch.randn(8, 5), None)])
        assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("tied", [False, True])
def test_no_tensor_of_a_pass_is_kept(tied):
    first, last, refs = nn.Linear(5, 5), nn.Linear(5, 5), []
    if tied:
        last.weight = first.weight
    module = nn.Sequential(first, nn.ReLU(True), nn.LayerNorm(5), last)
    for part in module:
        part.register_forward_hook(lambda module, args, output: refs.append(weakref.ref(output)))
    gc.disable()  # so that a graph in a reference cycle is noticed
    try:
        diagonal_fisher(module, [(torch.randn(8, 5), None)] * 2)
        assert len(refs) > 4
        assert not any(ref() is not None for ref in refs)
    finally:
        gc.enable()


def test_unwanted_parameters_require_gradients_again_afterwards():
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    module[0].bias.requires_grad_(False)
    diagonal_fisher(module, [(torch.randn(8, 5), None)], parameters=["1.weight"])
    assert [p.requires_grad for p in module.parameters()] == [True, False, True, True]
