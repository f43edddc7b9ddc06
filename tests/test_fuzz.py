"""Fits of random networks, streams and settings: none crashes, and BLIP keeps its promises at every step."""

import io
import math
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from lightning_blip import BLIP, Task, TaskHeads, TaskSequenceDataModule
from lightning_blip.frozen.diagonal import DiagonalState
from lightning_blip.frozen.kronecker import KroneckerState, as_matrix
from tests.helpers.fitting import fit
from tests.helpers.networks import Net

WIDTH, WORDS = 4, 7
# The shape of a sample. Hidden layers keep this shape, so any two of them can share a weight.
SHAPES = {"linear": (WIDTH,), "conv1d": (WIDTH, 5), "conv2d": (WIDTH, 3, 3), "embedding": (3,)}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": partial(nn.ReLU, inplace=True),
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "prelu": nn.PReLU,
}
DECAY = [0.0, 0.1]
OPTIMIZERS = [
    ("SGD", {"lr": [0.01, 0.1, 1.0], "weight_decay": DECAY}),
    ("SGD", {"lr": [0.01, 0.1], "momentum": [0.9], "nesterov": [False, True], "weight_decay": DECAY}),
    ("Adam", {"lr": [0.001, 0.1], "amsgrad": [False, True], "weight_decay": DECAY}),
    ("AdamW", {"lr": [0.001, 0.1], "weight_decay": DECAY}),
    ("RMSprop", {"lr": [0.001, 0.03], "momentum": [0.0, 0.5], "weight_decay": DECAY}),
    ("Adagrad", {"lr": [0.01, 0.3], "weight_decay": DECAY}),
]
TRAINER = {
    "precision": ["32-true", "64-true", "bf16-mixed"],
    "gradient_clip_val": [None, 0.1, 1.0],
    "gradient_clip_algorithm": ["norm", "value"],
    "accumulate_grad_batches": [1, 2, 3],
    "limit_train_batches": [1.0, 1, 2, 3],
}
SETTINGS = {
    "prior": ["auto", *(10.0**power for power in range(-12, 3))],
    "max_bits": range(1, 21),
    "pull": ["auto", 0.0, 0.3, 3.0, 100.0],
    "damping": ["auto", 0.0, 0.2, 5.0],
    "every": [1, 2, 5, 100],
    "average": [True, False],
    "samples": range(1, 41),
    "smoothing": [0.0, 0.1, 1.0],
    "labels": ["sampled", "empirical"],
    "norm_stats": [None, "per_task", "freeze", "shared"],
    "forgetting_budget": [None, 1e-3, 1.0],
    "expected_tasks": range(1, 21),
}
BASES = {
    "diagonal": {"rule": ["exact", "paper"], "cell": ["strict", "paper"], "scale": [0.0, 0.5, 2.0]},
    "kronecker": {"rank": [None, 1, 2, 3]},
}


@dataclass(frozen=True)
class Case:
    """One fit. All fields are plain values, so a printed failing case can be pasted into an ``@example``."""

    kind: str = "linear"
    depth: int = 1
    norm: str | None = None
    activation: str = "relu"
    bias: bool = True
    dropout: float = 0.0
    tied: bool = False
    own: tuple[int, ...] | None = None
    heads: bool = False
    classes: tuple[int, ...] = (2, 3)
    samples: tuple[int, ...] = (12, 10)
    epochs: tuple[int, ...] = (2, 2)
    batch_size: int = 4
    validates: bool = True
    optimizer: tuple[str, dict[str, Any]] = ("SGD", {"lr": 0.1, "momentum": 0.9})
    trainer: dict[str, Any] = field(default_factory=dict)
    blip: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


@st.composite
def cases(draw):
    # One source of randomness: with one strategy per field, most examples would be variations of a few.
    random = draw(st.randoms())
    pick = random.choice
    kind = pick(list(SHAPES))
    depth = random.randint(0, 3)
    norm = pick([None, "batch", "layer", "group"]) if depth else None
    heads = pick([False, True])
    # Heads are not tracked, and at least one parameter must be.
    bare = heads and depth == 0 and kind != "embedding"
    tasks = range(random.randint(1, 4))
    batch_size = random.randint(2 if norm == "batch" else 1, 16)
    counts = [count for count in range(1, min(40, 5 * batch_size) + 1) if _fits(count, batch_size, norm)]
    return Case(
        kind=kind,
        depth=depth,
        norm=norm,
        activation=pick(list(ACTIVATIONS)),
        bias=pick([True, False]),
        dropout=pick([0.0, 0.3]),
        tied=depth > 1 and pick([False, True]),
        own=pick([(), (1,)] if bare else [None, (), (1,)]),
        heads=heads,
        classes=tuple(random.randint(1, 4) for _ in tasks),
        samples=tuple(pick(counts) for _ in tasks),
        epochs=tuple(random.randint(1, 3) for _ in tasks),
        batch_size=batch_size,
        validates=pick([True, False]),
        optimizer=_optimizer(pick),
        trainer=_each(TRAINER, pick),
        blip=_settings(pick),
        seed=random.randint(0, 2**31),
    )


def _fits(count, batch_size, norm):
    """Return whether no batch has a single sample, which BatchNorm refuses in training."""
    return norm != "batch" or count % batch_size != 1


def _optimizer(pick):
    name, options = pick(OPTIMIZERS)
    return name, _each(options, pick)


def _settings(pick):
    basis = pick(list(BASES))
    chosen = {"basis": basis, **_each(BASES[basis], pick), **_each(SETTINGS, pick)}
    # A budget is refused beside a prior.
    return chosen if chosen["prior"] == "auto" else {**chosen, "forgetting_budget": None}


def _each(options, pick):
    return {name: pick(values) for name, values in options.items()}


class Own(nn.Module):
    """Parameters outside of any layer, one of them a scalar."""

    def __init__(self, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x * self.scale + self.shift


def network(case):
    embeds = case.kind == "embedding"
    shape = (3 * WIDTH,) if embeds else SHAPES[case.kind]
    hidden = [_layer(case, shape) for _ in range(case.depth)]
    if case.tied:
        hidden[-1].weight = hidden[-2].weight
    parts = [nn.Embedding(WORDS, WIDTH), nn.Flatten()] if embeds else []
    for layer in hidden:
        parts += [layer, _norm(case, shape), ACTIVATIONS[case.activation](), nn.Dropout(case.dropout)]
    if case.own is not None:
        parts.append(Own(case.own))
    name, options = case.optimizer
    module = Net(optimizer=partial(getattr(torch.optim, name), **options))
    module.body = nn.Sequential(*parts, nn.Flatten())
    features = math.prod(shape)
    head = TaskHeads(features, case.classes, case.bias) if case.heads else nn.Linear(features, 4, case.bias)
    module.head = head
    return module


def _layer(case, shape):
    if case.kind == "conv1d":
        return nn.Conv1d(WIDTH, WIDTH, 3, padding=1, bias=case.bias)
    if case.kind == "conv2d":
        return nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=case.bias)
    return nn.Linear(*shape, *shape, bias=case.bias)


def _norm(case, shape):
    if case.norm == "batch":
        return (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0])
    if case.norm == "layer":
        return nn.LayerNorm(shape)
    return nn.GroupNorm(2, shape[0]) if case.norm == "group" else nn.Identity()


def stream(case):
    tasks = [
        Task(str(i), _points(case, count, classes), _points(case, 3, classes) if case.validates else None)
        for i, (count, classes) in enumerate(zip(case.samples, case.classes, strict=True))
    ]
    return TaskSequenceDataModule(tasks, epochs_per_task=case.epochs, batch_size=case.batch_size)


def _points(case, count, classes):
    y, shape = torch.randint(classes, (count,)), SHAPES[case.kind]
    if case.kind == "embedding":
        return TensorDataset(torch.randint(WORDS, (count, *shape)), y)
    return TensorDataset(torch.randn(count, *shape) + y.view(-1, *(1 for _ in shape)), y)


class Watch(pl.Callback):
    """Checks the promises of BLIP after every batch and at every boundary."""

    def __init__(self, blip):
        self.blip = blip
        self.boundaries = []
        self.kronecker_before = {}

    def on_train_start(self, trainer, pl_module):
        self.heads = heads_of(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.look(trainer, pl_module)
        # A layer is put into its cells at each pull, not between two of them.
        if all(state.pace.steps == 0 for state in {**self.diagonal_states, **self.kronecker_states}.values()):
            check_coordinates(self.kronecker_before, pl_module)

    def on_task_end(self, trainer, pl_module, task):
        # The task is consolidated already. Earlier frozen bits must be the same after that, too.
        self.look(trainer, pl_module)
        check_coordinates(self.kronecker_before, pl_module)
        if self.boundaries:
            check_bits_grow(self.boundaries[-1], self.diagonal_states)
            check_eigenvalues_grow(self.kronecker_before, self.kronecker_states)
        # States replace their tensors when they change, so a shallow copy keeps the present values.
        own = dict(pl_module.named_parameters())
        states = {name: copy(state) for name, state in self.diagonal_states.items()}
        self.boundaries.append({name: (one, one.frozen_code(own[name])) for name, one in states.items()})
        self.kronecker_before = {name: copy(layer) for name, layer in self.kronecker_states.items()}

    @property
    def diagonal_states(self):
        return self.states_of(DiagonalState)

    @property
    def kronecker_states(self):
        return self.states_of(KroneckerState)

    def states_of(self, kind):
        states = {name: self.blip.state(name) for name in self.blip.bits()}
        return {name: state for name, state in states.items() if isinstance(state, kind)}

    def look(self, trainer, pl_module):
        check_finite(pl_module)
        check_cells(self.diagonal_states, pl_module)
        if self.blip.cell == "strict":
            check_codes(self.boundaries, pl_module)
        now = heads_of(pl_module)
        check_heads(self.heads, now, active=trainer.datamodule.task.index)
        self.heads = now


def check_finite(module):
    for name, value in module.state_dict().items():
        assert value.isfinite().all(), name


def check_cells(parameters, module):
    own = dict(module.named_parameters())
    for name, state in parameters.items():
        if state.tasks:
            low, high = state.limits(own[name].dtype)
            assert ((own[name] >= low) & (own[name] <= high)).all(), name


def check_codes(boundaries, module):
    own = dict(module.named_parameters())
    for task, frozen in enumerate(boundaries):
        for name, (state, code) in frozen.items():
            assert torch.equal(state.frozen_code(own[name]), code), f"{name} lost bits of task {task}"


def check_coordinates(layers, module):
    own = dict(module.named_parameters())
    for name, layer in layers.items():
        names = [name] if layer.shape[1] == own[name][0].numel() else [name, name.replace("weight", "bias")]
        theta = as_matrix([own[part] for part in names])
        omega = layer.output_basis.T @ (theta - layer.anchor) @ layer.input_basis
        assert (omega.abs() <= layer.width + 1e-6 * layer.bound).all(), name


def check_bits_grow(before, now):
    for name, (state, _) in before.items():
        assert (now[name].bits >= state.bits).all(), name


def check_eigenvalues_grow(before, now):
    # The number of frozen bits may fall, because the precision is a mean over tasks and the basis rotates.
    # But a factor is a sum over tasks of matrices without negative eigenvalues. By Weyl's inequality, its
    # sorted eigenvalues never fall, and neither does the mean of the eigenvalues that a rank leaves out.
    for name, old in before.items():
        for side in ("input", "output"):
            then, now_ = (getattr(state, f"{side}_values") for state in (old, now[name]))
            rest, rest_now = (getattr(state, f"{side}_rest") for state in (old, now[name]))
            rounding = 1e-5 * float(then.max())
            assert (now_ >= then - rounding).all(), name
            assert rest_now >= rest - rounding, name


def heads_of(module):
    heads = module.head.heads if isinstance(module.head, TaskHeads) else []
    return [[theta.detach().clone() for theta in head.parameters()] for head in heads]


def check_heads(before, now, active):
    for index, (old, new) in enumerate(zip(before, now, strict=True)):
        assert index == active or all(map(torch.equal, old, new)), f"head {index} moved in task {active}"


def check_restored(blip, module, options):
    saved = io.BytesIO()
    torch.save(blip.state_dict(), saved)
    saved.seek(0)
    restored = BLIP(**options)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    for kept, found in ((blip.bits(), restored.bits()), (blip.precision(), restored.precision())):
        assert kept.keys() == found.keys()
        assert all(torch.equal(kept[name], found[name]) for name in kept)
    # This compares the anchors, too, which a restored state reads from the parameters.
    assert restored.predicted_forgetting(module) == blip.predicted_forgetting(module)


def check(case):
    for feature in (case.kind, f"norm: {case.norm}", "heads" if case.heads else "shared head"):
        event(f"{feature}, {case.blip.get('basis', 'diagonal')}")
    torch.manual_seed(case.seed)
    blip, module, tasks = BLIP(**case.blip), network(case), stream(case)
    watch = Watch(blip)
    fit([blip, watch], module, tasks, **case.trainer)
    assert blip.tasks_learned == len(watch.boundaries) == len(tasks)
    assert 0 <= blip.used_capacity <= 1
    check_restored(blip, module, case.blip)


# Every run has cases of both bases, heads, convolutions and norms, with frozen bits and with steps large
# enough to change them.
FREEZING = {"prior": 1e-6, "samples": 20}


@settings(max_examples=15)
@given(cases())
@example(Case("conv2d", depth=2, norm="batch", heads=True, blip={**FREEZING, "pull": 0.0}))
@example(Case("conv1d", depth=2, norm="group", heads=True, blip={**FREEZING, "basis": "kronecker"}))
@example(Case("embedding", norm="layer", own=(), blip={**FREEZING, "basis": "kronecker", "rank": 2}))
@example(Case(depth=3, tied=True, samples=(16, 40), epochs=(2, 3), blip={**FREEZING, "every": 3}))
@example(
    Case(
        classes=(2, 3, 2),
        samples=(9, 9, 9),
        epochs=(2, 2, 2),
        blip={**FREEZING, "rule": "paper", "pull": 0.0},
    )
)
def test_blip_keeps_its_promises_in_random_fits(case):
    check(case)


@pytest.mark.nightly
@settings(max_examples=200)
@given(cases())
def test_blip_keeps_its_promises_in_many_random_fits(case):
    check(case)
