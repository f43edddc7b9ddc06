"""Checkpoints that each version of the saved state wrote."""
