"""Run a module in evaluation mode, and restore it and the random number generators afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def left_as_before(module: nn.Module, device: torch.device, wanted: Iterable[nn.Parameter]) -> Iterator[None]:
    """Set evaluation mode, full precision and gradients of ``wanted`` only; restore everything at the end.

    Modes, buffers, ``requires_grad`` and random number generators are restored, also after an error.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if "torch._dynamo" in sys.modules:
            # Compiled code fuses operations, so that they cannot be recorded one by one.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if device.type == "cuda" and any(isinstance(part, nn.RNNBase) for part in module.modules()):
            # cuDNN has no backward pass for recurrent layers in evaluation mode.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        # Cloned here, outside an inference mode of the caller, so that the copies are ordinary tensors.
        modes = [(part, part.training) for part in module.modules()]
        buffers = [
            (part, name, buffer, buffer.clone())
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        unwanted = {p for p in module.parameters() if p.requires_grad}.difference(wanted)
        module.eval()
        for parameter in unwanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in unwanted:
                parameter.requires_grad_(True)
            for part, mode in modes:
                part.training = mode
            with torch.no_grad():
                for part, name, buffer, value in buffers:
                    part._buffers[name] = buffer.copy_(value)
