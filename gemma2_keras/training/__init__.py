"""Fine-tuning: data of any kind as tokens, packed, and long runs that survive an interruption."""

from gemma2_keras.training.jsonl import read_jsonl
from gemma2_keras.training.preparation import DataReport, prepare
from gemma2_keras.training.token_dataset import TokenDataset

__all__ = ["DataReport", "TokenDataset", "prepare", "read_jsonl"]
