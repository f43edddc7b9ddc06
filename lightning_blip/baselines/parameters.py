"""Saved values in the place of the parameters that they belong to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def beside(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return saved values in the order and on the device of the parameters that they belong to."""
    return {name: saved[name].to(theta.device) for name, theta in parameters.items() if name in saved}
