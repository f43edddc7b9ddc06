"""Image data sets, from a folder in the forms that people have them in, or from the hub."""

from benchmarks.data.loader import load

__all__ = ["load"]
