"""The function that holds back steps gives the same result compiled, uncompiled and in parts."""

import pytest
import torch

from lightning_blip.frozen import fused
from lightning_blip.frozen.base import Step
from lightning_blip.frozen.diagonal import DiagonalState
from lightning_blip.frozen.fused import Compiled, FusedStepper, hold_back_all

SCALE = 0.7


def steps(sizes, cell="strict", dtype=torch.float32, rate=0.1, update=True, pull=3.0, divisor=True):
    """Return steps of parameters of several shapes, the same at every call."""
    torch.manual_seed(0)
    made = []
    for shape in sizes:
        theta = (torch.rand(shape) - 0.5).to(dtype)
        frozen = DiagonalState.of(theta, bound=0.7, prior=1e-3, cell=cell)
        frozen.information = torch.exp2(torch.rand(shape) * 60 - 20) * (torch.rand(shape) < 0.9)
        frozen.freeze(theta, torch.randint(0, 21, theta.shape), keep_free_bits=True)
        step = torch.randn_like(theta)
        theta -= rate * step
        P = torch.exp2(torch.randn_like(theta)) if divisor and pull else None
        made.append(Step([theta], frozen, pull, rate, P, step if update else None, rate))
    return made


def held_back(made, compiled=None):
    """Return the parameters of steps that are held back."""
    hold_back_all(made, SCALE, compiled or Compiled())
    return [step.parameters[0] for step in made]


def by_the_formulas(step):
    """Return the parameters of a step that is held back, by the formulas in float64."""
    theta, bits = step.parameters[0].double(), step.state.bits.double()
    if step.update is not None:
        theta = theta + step.factor * step.update.double() * (1 - 2 ** (-SCALE * bits))
    strength = step.strength * step.state.prior * step.state.information.double()
    if step.divisor is not None:
        strength = strength / step.divisor.double()
    theta = theta + (step.state.anchor(torch.float64) - theta) * strength / (1 + strength)
    return theta.clamp(*step.state.limits(torch.float64))


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("pull", [0.0, 3.0])
@pytest.mark.parametrize("cell", ["strict", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divisor", [False, True])
def test_a_step_is_held_back_by_the_formulas(divisor, dtype, cell, pull, update):
    made = steps([(4, 5), (), (7,), (0,)], cell, dtype, update=update, pull=pull, divisor=divisor)
    expected = [by_the_formulas(step) for step in made]
    for theta, right in zip(held_back(made), expected, strict=True):
        torch.testing.assert_close(theta.double(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_and_memory_formats_give_the_same_bits(dtype, monkeypatch):
    sizes = [(2, 3, 5, 7), (100,), (), (1,)]
    expected = held_back(steps(sizes, dtype=dtype))
    plain = Compiled()
    plain.works = False
    monkeypatch.setattr(fused, "CHUNK", 16)
    monkeypatch.setattr(fused, "SMALL", 2)
    monkeypatch.setattr(fused, "CALLS", 1)
    for formats in ("all", "theta alone"):
        made = steps(sizes, dtype=dtype)
        made[0].parameters = [made[0].parameters[0].to(memory_format=torch.channels_last)]
        if formats == "all":
            made[0].state.packed = made[0].state.packed.to(memory_format=torch.channels_last)
            made[0].state.gained = made[0].state.gained.to(memory_format=torch.channels_last)
            made[0].update = made[0].update.to(memory_format=torch.channels_last)
        for theta, other in zip(held_back(made, plain), expected, strict=True):
            assert torch.equal(theta, other)


def test_the_function_is_compiled_once_and_gives_the_same_bits(monkeypatch):
    sizes = [(300, 401), (1,), (9,), (1000,), (33, 3, 2)]
    compiled = Compiled()
    for rate in (0.1, 0.03):
        expected = held_back(steps(sizes, rate=rate))
        with monkeypatch.context() as patch:
            patch.setattr(fused, "CHUNK", 100)
            patch.setattr(fused, "SMALL", 8)
            with (
                torch.compiler.set_stance("default" if rate == 0.1 else "fail_on_recompile"),
                torch.no_grad(),
            ):
                found = held_back(steps(sizes, rate=rate), compiled)
        assert compiled.function is not None
        assert compiled.works
        for theta, other in zip(found, expected, strict=True):
            assert torch.equal(theta, other)


def test_where_compiling_fails_it_is_tried_once_with_one_warning(monkeypatch, recwarn):
    def fails(*arguments, **options):
        def call(*arguments):
            raise RuntimeError("no compiler")

        return call

    expected = held_back(steps([(400,), (50,)]))
    compiled = Compiled()
    monkeypatch.setattr(fused, "CHUNK", 100)
    monkeypatch.setattr(fused, "SMALL", 60)
    monkeypatch.setattr(torch, "compile", fails)
    for _ in range(2):
        for theta, other in zip(held_back(steps([(400,), (50,)]), compiled), expected, strict=True):
            assert torch.equal(theta, other)
    assert [str(one.message) for one in recwarn if "no compiler" in str(one.message)] == [
        "torch.compile does not work here (no compiler): steps take longer than they need to"
    ]


def test_steps_of_few_values_are_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: pytest.fail("compiled"))
    held_back(steps([(784, 100), (100,)]))


def test_a_stepper_uses_the_walls_of_the_last_boundary():
    theta = torch.full((4, 6), 0.3)
    state = DiagonalState.of(theta, bound=1.0, prior=1.0)
    stepper = FusedStepper()
    for bits in (1, 5):
        state.freeze(theta, torch.full((4, 6), bits), keep_free_bits=True)
        anchor = theta.clone()
        low, high = state.limits(torch.float32)
        theta += 10.0
        stepper([Step([theta], state)], scale=0.0)
        assert torch.equal(theta, high)
        theta.copy_(anchor - 10.0)
        stepper([Step([theta], state)], scale=0.0)
        assert torch.equal(theta, low)
        theta.copy_(anchor)


def test_steps_of_different_kinds_are_held_back_as_if_each_came_alone():
    kinds = [
        {},
        {"update": False},
        {"pull": 0.0},
        {"update": False, "pull": 0.0},
        {"divisor": False},
        {"cell": "paper"},
        {"dtype": torch.float64},
    ]
    sizes = [(4, 5), (7,)]
    alone = [theta for kind in kinds for theta in held_back(steps(sizes, **kind))]
    together = held_back([step for kind in kinds for step in steps(sizes, **kind)])
    assert len(together) == 2 * len(kinds)
    for theta, expected in zip(together, alone, strict=True):
        assert torch.equal(theta, expected)
