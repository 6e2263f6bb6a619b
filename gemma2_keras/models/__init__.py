"""Whole models without a task: token ids in, hidden states out."""
