"""Each contender as a function that loads a checkpoint from a folder and returns what makes its first logits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_TOKENS = np.arange(5, 13)[None]
_BUFFER = 2**24


def file(folder: Path) -> Callable[[], Any]:
    """The limit: reading the file, into a buffer that is used again and again."""
    buffer = bytearray(_BUFFER)
    with open(folder / "model.safetensors", "rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass
    return lambda: None


def transformers(folder: Path) -> Callable[[], Any]:
    import torch
    from transformers import Gemma2ForCausalLM

    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def logits() -> Any:
        with torch.no_grad():
            return model(torch.tensor(_TOKENS), logits_to_keep=1).logits.float().numpy()

    return logits


def ours(folder: Path) -> Callable[[], Any]:
    import keras

    from gemma2_keras import Gemma2Backbone

    backbone = Gemma2Backbone.from_preset(folder)

    def logits() -> Any:
        states = backbone.predict_on_batch(
            {"token_ids": _TOKENS.astype("int32"), "padding_mask": np.ones_like(_TOKENS)}
        )
        return keras.ops.convert_to_numpy(backbone.token_embedding(states[:, -1:], reverse=True))

    return logits


LOADERS = {"file": file, "transformers": transformers, "gemma2_keras": ours}


def imports(name: str) -> None:
    """Load the libraries of a contender beforehand: they are not what is measured."""
    if name == "transformers":
        import torch  # noqa: F401
        from transformers import Gemma2ForCausalLM  # noqa: F401
    elif name == "gemma2_keras":
        from gemma2_keras import Gemma2Backbone  # noqa: F401


def checkpoint(shape: dict[str, Any], dtype: str) -> Path:
    """A folder with a checkpoint of random weights, made when there is none."""
    from gemma2_keras import Gemma2Config
    from gemma2_keras.checkpoints.names import weight_map
    from gemma2_keras.checkpoints.transformers import write_checkpoint

    config = Gemma2Config(**shape)
    folder = Path(tempfile.gettempdir()) / f"gemma2-keras-bench-{config.num_layers}x{config.hidden_dim}-{dtype}"
    if folder.exists():
        return folder
    shapes = {name: weight.shape for name, weight in weight_map(config).items()}
    numbers = (0.02 * np.random.default_rng(0).standard_normal(2**22)).astype(dtype)

    class Random:
        def read(self, name: str) -> np.ndarray:
            return np.resize(numbers, shapes[name])

    random: Any = Random()
    random.config, random.dtype = config, dtype
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        (Path(beside) / "checkpoint").mkdir()
        write_checkpoint(Path(beside) / "checkpoint", random)
        (Path(beside) / "checkpoint").rename(folder)
    return folder
