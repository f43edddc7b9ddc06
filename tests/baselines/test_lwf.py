"""LwF: it learns as with the distillation loss written out."""

from copy import deepcopy
from functools import partial

import pytest
import torch

from benchmarks.memory import held_bytes
from lightning_blip import TaskHeads
from lightning_blip.baselines import LwF
from tests.helpers.learning import NetWithHeads, disturb, learn, learn_by_hand
from tests.helpers.networks import Net, pairs


class SlowLwF:
    """LwF with soft targets from a copy of the whole network, and the divergence as a sum."""

    def __init__(self, strength, temperature):
        self.strength, self.temperature = strength, temperature
        self.old, self.learned = None, 0

    def penalty(self, module, x):
        if self.old is None:
            return torch.zeros(())
        total, heads = 0.0, self.heads(module)
        for head, old_head in zip(heads, self.heads(self.old), strict=True):
            p = torch.softmax(head(module.body(x)) / self.temperature, 1)
            target = torch.softmax(old_head(self.old.body(x)) / self.temperature, 1).detach()
            total += (target * (target / p).log()).sum() / len(x)
        return self.strength * self.temperature**2 * total / len(heads)

    def heads(self, module):
        return module.head.heads[: self.learned] if isinstance(module.head, TaskHeads) else [module.head]

    def end_step(self, module, before, gradients):
        pass

    def end_task(self, module, stream):
        self.learned += 1
        self.old = deepcopy(module).eval()


@pytest.mark.parametrize("net", [Net, NetWithHeads], ids=["shared head", "head per task"])
def test_a_stream_is_learned_as_by_hand(net, tmp_path):
    settings = {"strength": 0.7, "temperature": 3.0}
    module = learn(LwF(**settings), net=net, folder=tmp_path)
    expected = learn_by_hand(SlowLwF(**settings), net)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


def test_soft_targets_are_computed_in_evaluation_mode(tmp_path):
    lwf = LwF()
    module = learn(lwf, net=partial(Net, norm=True), folder=tmp_path, max_epochs=2).eval()
    assert max(gradient.abs().max() for gradient in added(lwf, module)) < 1e-6
    disturb(module)
    assert min(gradient.abs().max() for gradient in added(lwf, module)) > 1e-4


def added(lwf, module):
    """Return the gradients that LwF adds in the second task to those of a loss of zero."""
    lwf.on_task_start(None, module, pairs().tasks[1])
    loss = 0 * module(torch.randn(16, 8)).sum()
    lwf.on_before_backward(None, module, loss)
    return torch.autograd.grad(loss, list(module.parameters()))


def test_old_heads_keep_learning(tmp_path):
    one, two = (learn(LwF(), net=NetWithHeads, folder=tmp_path, max_epochs=epochs) for epochs in (2, 4))
    assert not torch.equal(one.head.heads[0].weight, two.head.heads[0].weight)
    assert torch.equal(one.head.heads[2].weight, two.head.heads[2].weight)


def test_its_state_is_one_copy_of_the_network(tmp_path):
    lwf = LwF()
    module = learn(lwf, folder=tmp_path)
    assert held_bytes(lwf, module) == sum(theta.nbytes for theta in module.parameters())


def test_accumulated_batches_count_as_one(tmp_path):
    """Lightning divides the loss of each batch by their number, and LwF its divergence."""
    whole = learn(LwF(), folder=tmp_path, stream=pairs(batch_size=40))
    parts = learn(LwF(), folder=tmp_path, stream=pairs(batch_size=20), accumulate_grad_batches=2)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)
