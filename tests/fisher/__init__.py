"""Tests of the diagonal Fisher information."""
