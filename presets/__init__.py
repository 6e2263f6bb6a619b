"""Presets of Gemma 2 models, as data."""
