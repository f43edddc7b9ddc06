"""Checkpoints as each version of the saved state was written."""
