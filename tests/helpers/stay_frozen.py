"""A callback that checks after every step that frozen bits are unchanged."""

import pytorch_lightning as pl

from tests.helpers.fitting import same


class StayFrozen(pl.Callback):
    """Asserts after every step that the bits frozen by the first task are unchanged."""

    def __init__(self, blip):
        self.blip, self.before = blip, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.blip.tasks_learned:
            codes = {
                name: self.blip.state(name).frozen_code(dict(pl_module.named_parameters())[name])
                for name in self.blip.bits()
            }
            self.before = self.before or codes
            assert same(codes, self.before)
