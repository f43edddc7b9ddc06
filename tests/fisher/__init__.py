"""Tests of the diagonal Fisher."""
