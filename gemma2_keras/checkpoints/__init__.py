"""Presets and checkpoints: names to folders, files to weights, weights to files."""
