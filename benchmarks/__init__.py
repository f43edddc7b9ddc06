"""Streams, methods and measurements behind the figures in the documentation."""
