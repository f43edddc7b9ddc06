"""Tests of lightning_blip."""
