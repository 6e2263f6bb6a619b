"""Text to token ids and back, with NumPy and sentencepiece alone."""
