"""The parts that depend on Lightning, and on processes and random state during a fit."""
