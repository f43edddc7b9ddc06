"""Fine-tuning: the lower bound."""

from __future__ import annotations

import pytorch_lightning as pl


class FineTuning(pl.Callback):
    """Nothing is done against forgetting: task t minimises its own loss L_t(θ), from where task t − 1 ended.

    Source:
        The lower bound of, among others, Kirkpatrick et al., PNAS 2017 ("SGD").
    """
