"""Gemma 2's building blocks as Keras layers, each a thin holder of weights around a function of `ops`."""
