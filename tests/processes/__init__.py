"""Fits in several processes."""
