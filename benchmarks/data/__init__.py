"""Image data sets, from a folder in any of their common formats, or from the Hugging Face hub."""

from benchmarks.data.loader import load

__all__ = ["load"]
