"""Attention and recurrent layers as several operations, because rules need one operation per parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def _without_override(function: Any) -> Any:
    """Return a copy of ``function`` with has_torch_function replaced by False, so that its body runs."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, "has_torch_function": lambda _: False},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _lstm_cell(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    i, f, g, o = (from_input + from_hidden).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    (ri, zi, ni), (rh, zh, nh) = from_input.chunk(3, 1), from_hidden.chunk(3, 1)
    n = (ni + (ri + rh).sigmoid() * nh).tanh()
    return (n + (zi + zh).sigmoid() * (state[0] - n),)


def _tanh_cell(from_input: Tensor, from_hidden: Tensor, _: State) -> State:
    return ((from_input + from_hidden).tanh(),)


def _relu_cell(from_input: Tensor, from_hidden: Tensor, _: State) -> State:
    return ((from_input + from_hidden).relu(),)


def _step(cell: Cell) -> Callable[..., Any]:
    """Return the function of a single step, as in ``nn.LSTMCell``."""

    def step(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        state = cell(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return state[0] if isinstance(hx, Tensor) else state

    return step


def _unrolled(cell: Cell) -> Callable[..., Any]:
    """Return the function of all steps of all layers, as in ``nn.LSTM``, but not for packed sequences."""

    def unrolled(
        input: Tensor,
        hx: Any,
        weights: Any,
        has_biases: Any,
        num_layers: Any,
        dropout: Any,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        if not isinstance(has_biases, bool):  # packed sequences have the batch sizes as a further argument
            return NotImplemented
        x = input.transpose(0, 1) if batch_first else input
        states = [hx] if isinstance(hx, Tensor) else list(hx)
        directions = 2 if bidirectional else 1
        per_direction = len(weights) // (num_layers * directions)
        last: list[State] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                state = tuple(part[index] for part in states)
                parts = list(weights[index * per_direction : (index + 1) * per_direction])
                steps, state = _run(cell, x, state, parts, has_biases, backwards=direction == 1)
                outputs.append(steps)
                last.append(state)
            x = torch.cat(outputs, 2)
        final = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return (x.transpose(0, 1) if batch_first else x, *final)

    return unrolled


def _run(
    cell: Cell, x: Tensor, state: State, weights: list[Tensor], has_biases: bool, backwards: bool
) -> tuple[Tensor, State]:
    """Run one layer in one direction over ``x``, (steps, batch, features); return its outputs and state."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:4] if has_biases else (None, None)
    project = weights[-1] if len(weights) > (4 if has_biases else 2) else None
    steps = list(F.linear(x, w_ih, b_ih).unbind(0))
    outputs = []
    for from_input in reversed(steps) if backwards else steps:
        hidden, *memory = cell(from_input, F.linear(state[0], w_hh, b_hh), state)
        state = (hidden if project is None else F.linear(hidden, project), *memory)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _recurrent() -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Yield each recurrent operation and its replacement."""
    cells = {"lstm": _lstm_cell, "gru": _gru_cell, "rnn_tanh": _tanh_cell, "rnn_relu": _relu_cell}
    for name, cell in cells.items():
        yield getattr(torch, name), _unrolled(cell)
        yield getattr(torch, f"{name}_cell"), _step(cell)


#: For each operation, a function that computes the same by operations with rules, or NotImplemented.
REWRITES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _without_override(F.multi_head_attention_forward),
    **dict(_recurrent()),
}
