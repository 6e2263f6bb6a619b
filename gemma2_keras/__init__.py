"""Gemma 2 for Keras 3, on TensorFlow, JAX and PyTorch.

Naming the package loads nothing; each public name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma2_keras.checkpoints.catalogue import describe_preset, list_presets
    from gemma2_keras.checkpoints.fitting import MemoryEstimate, estimate_memory
    from gemma2_keras.config import Gemma2Config
    from gemma2_keras.errors import WontFit
    from gemma2_keras.models.gemma2_backbone import Gemma2Backbone
    from gemma2_keras.preprocessing.causal_lm_preprocessor import Gemma2CausalLMPreprocessor
    from gemma2_keras.preprocessing.tokenizer import Gemma2Tokenizer, IncrementalDecoder
    from gemma2_keras.tasks.causal_lm import Gemma2CausalLM
    from gemma2_keras.tasks.distillation_loss import DistillationLoss
    from gemma2_keras.tasks.next_token_loss import NextTokenLoss
    from gemma2_keras.training.checkpoints import RunCheckpoints
    from gemma2_keras.training.fine_tuning import fine_tune
    from gemma2_keras.training.history import RunHistory, TrainingHistory
    from gemma2_keras.training.jsonl import read_jsonl
    from gemma2_keras.training.optimizers import adamw
    from gemma2_keras.training.plotting import plot_history
    from gemma2_keras.training.preparation import DataReport, prepare
    from gemma2_keras.training.progress import TrainingProgress
    from gemma2_keras.training.teaching import TaughtDataset, teach
    from gemma2_keras.training.token_dataset import TokenDataset

__version__ = "0.1.0"

_HOMES = {
    "DataReport": "training.preparation",
    "DistillationLoss": "tasks.distillation_loss",
    "Gemma2Backbone": "models.gemma2_backbone",
    "Gemma2CausalLM": "tasks.causal_lm",
    "Gemma2CausalLMPreprocessor": "preprocessing.causal_lm_preprocessor",
    "Gemma2Config": "config",
    "Gemma2Tokenizer": "preprocessing.tokenizer",
    "IncrementalDecoder": "preprocessing.tokenizer",
    "MemoryEstimate": "checkpoints.fitting",
    "NextTokenLoss": "tasks.next_token_loss",
    "RunCheckpoints": "training.checkpoints",
    "RunHistory": "training.history",
    "TaughtDataset": "training.teaching",
    "TokenDataset": "training.token_dataset",
    "TrainingHistory": "training.history",
    "TrainingProgress": "training.progress",
    "WontFit": "errors",
    "adamw": "training.optimizers",
    "describe_preset": "checkpoints.catalogue",
    "estimate_memory": "checkpoints.fitting",
    "fine_tune": "training.fine_tuning",
    "list_presets": "checkpoints.catalogue",
    "plot_history": "training.plotting",
    "prepare": "training.preparation",
    "read_jsonl": "training.jsonl",
    "teach": "training.teaching",
}

__all__ = [
    "DataReport",
    "DistillationLoss",
    "Gemma2Backbone",
    "Gemma2CausalLM",
    "Gemma2CausalLMPreprocessor",
    "Gemma2Config",
    "Gemma2Tokenizer",
    "IncrementalDecoder",
    "MemoryEstimate",
    "NextTokenLoss",
    "RunCheckpoints",
    "RunHistory",
    "TaughtDataset",
    "TokenDataset",
    "TrainingHistory",
    "TrainingProgress",
    "WontFit",
    "adamw",
    "describe_preset",
    "estimate_memory",
    "fine_tune",
    "list_presets",
    "plot_history",
    "prepare",
    "read_jsonl",
    "teach",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("jax", "tensorflow", "torch"):
            raise
        raise ImportError(
            f"The backend of Keras is {error.name}, which is not installed: pip install 'gemma2-keras[{error.name}]', "
            "or set the environment variable KERAS_BACKEND to one that is, before Python starts."
        ) from error
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
