"""TaskHeads: the active head learns, the others rest."""

import re

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from lightning_blip import TaskHeads

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: Adagrad(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_head_that_is_not_active_is_never_moved(make, set_to_none):
    heads = TaskHeads(4, classes=[2, 3, 2])
    optimizer = make(heads.parameters())
    for task in (0, 1, 0, 2, 1):
        heads.active = task
        before = {name: value.clone() for name, value in heads.state_dict().items()}
        for _ in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            heads(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
        for name, value in heads.state_dict().items():
            assert torch.equal(value, before[name]) is not name.startswith(f"heads.{task}.")


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_head_left_while_evaluating_rests_once_training_goes_on(make):
    heads = TaskHeads(4, classes=[2, 2])
    optimizer = make(heads.parameters())
    heads(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    heads.eval()
    heads.active = 1
    heads.train()
    before = heads.heads[0].weight.clone()
    optimizer.zero_grad(set_to_none=False)
    heads(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    assert torch.equal(heads.heads[0].weight, before)


def test_looking_at_another_head_in_evaluation_keeps_the_gradient_being_accumulated():
    heads = TaskHeads(4, classes=[2, 2])
    heads.active = 1
    heads(torch.randn(5, 4)).sum().backward()
    gradient = heads.heads[1].weight.grad.clone()
    heads.eval()
    heads.active = 0
    heads.active = 1
    heads.train()
    assert torch.equal(heads.heads[1].weight.grad, gradient)


def test_each_task_has_its_width_and_the_state_is_that_of_the_heads():
    heads = TaskHeads(4, classes=[2, 5], bias=False)
    assert len(heads) == 2
    assert heads.active == 0
    assert heads(torch.zeros(3, 7, 4)).shape == (3, 7, 2)
    heads.active = 1
    assert heads(torch.zeros(3, 4)).shape == (3, 5)
    assert list(heads.state_dict()) == ["heads.0.weight", "heads.1.weight"]
    assert "active=1" in repr(heads)


def test_which_head_is_active_is_not_part_of_the_weights():
    heads, restored = TaskHeads(4, classes=[2, 2]), TaskHeads(4, classes=[2, 2])
    heads.active = 1
    restored.load_state_dict(heads.state_dict())
    assert restored.active == 0


@pytest.mark.parametrize("classes", [[], [2, 0], [-1]])
def test_tasks_without_classes_are_refused(classes):
    with pytest.raises(ValueError, match=re.escape(f"classes={classes} must hold one number for each task")):
        TaskHeads(4, classes=classes)


@pytest.mark.parametrize("task", [-1, 2])
def test_a_head_that_is_not_there_is_refused(task):
    heads = TaskHeads(4, classes=[2, 2])
    with pytest.raises(ValueError, match=f"active={task} is none of the 2 heads, 0 to 1"):
        heads.active = task
