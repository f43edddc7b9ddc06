"""The diagonal Fisher information of any ``nn.Module``, exact and fast."""

from lightning_blip.fisher.diagonal import diagonal_fisher

__all__ = ["diagonal_fisher"]
