"""Rules: how per-sample gradients follow from an operation's inputs and the gradient of its output.

A rule has the signature of its operation. For each argument that may be a parameter it yields that argument
and a function that computes its per-sample gradients. The function takes the gradient of the operation's
output and ``samples_first``, which puts the samples of a tensor that is laid out like the output into a new
dimension 0.

To add a rule, write it in the module of its kind and enter it into the table at the end of that module.
"""

from typing import Any

from lightning_blip.fisher.rules.base import GradientRule
from lightning_blip.fisher.rules.elementwise import ELEMENTWISE, EXPANSIONS
from lightning_blip.fisher.rules.linear_maps import LINEAR_MAPS
from lightning_blip.fisher.rules.tables import TABLES

__all__ = ["EXPANSIONS", "RULES"]

#: All rules, by the function or method that they belong to.
RULES: dict[Any, GradientRule] = {**EXPANSIONS, **ELEMENTWISE, **LINEAR_MAPS, **TABLES}
