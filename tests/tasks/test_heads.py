"""TaskHeads: the active head learns, and the others do not change."""

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
def test_no_optimizer_moves_an_inactive_head(make, set_to_none):
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
def test_a_head_that_was_left_in_evaluation_is_not_moved_in_training(make):
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


def test_evaluating_another_head_keeps_an_accumulated_gradient():
    heads = TaskHeads(4, classes=[2, 2])
    heads.active = 1
    heads(torch.randn(5, 4)).sum().backward()
    gradient = heads.heads[1].weight.grad.clone()
    heads.eval()
    heads.active = 0
    heads.active = 1
    heads.train()
    assert torch.equal(heads.heads[1].weight.grad, gradient)


def test_each_head_has_the_width_of_its_task_and_is_all_that_is_saved():
    heads = TaskHeads(4, classes=[2, 5], bias=False)
    assert len(heads) == 2
    assert heads.active == 0
    assert heads(torch.zeros(3, 7, 4)).shape == (3, 7, 2)
    heads.active = 1
    assert heads(torch.zeros(3, 4)).shape == (3, 5)
    assert list(heads.state_dict()) == ["heads.0.weight", "heads.1.weight"]
    assert "active=1" in repr(heads)


def test_the_active_head_is_not_part_of_the_state_dict():
    heads, restored = TaskHeads(4, classes=[2, 2]), TaskHeads(4, classes=[2, 2])
    heads.active = 1
    restored.load_state_dict(heads.state_dict())
    assert restored.active == 0


def test_train_returns_the_module_as_in_torch():
    heads = TaskHeads(4, classes=[2, 2])
    assert heads.train() is heads


@pytest.mark.parametrize("classes", [[], [2, 0], [-1]])
def test_tasks_without_classes_are_refused(classes):
    with pytest.raises(ValueError, match=re.escape(f"classes={classes} must hold one number for each task")):
        TaskHeads(4, classes=classes)


@pytest.mark.parametrize("task", [-1, 2])
def test_activating_a_missing_head_is_refused(task):
    heads = TaskHeads(4, classes=[2, 2])
    with pytest.raises(ValueError, match=f"active={task} is none of the 2 heads, 0 to 1"):
        heads.active = task
