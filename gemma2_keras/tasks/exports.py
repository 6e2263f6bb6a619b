"""A task into files: of this package, of transformers, of KerasHub and of llama.cpp."""

from __future__ import annotations

import os
from typing import Any

from gemma2_keras.checkpoints import exporting, presets
from gemma2_keras.checkpoints.contents import LiveCheckpoint


class Exports:
    """The part of a task that writes it into files; what it writes is its backbone and its preprocessor."""

    backbone: Any
    preprocessor: Any

    def save_to_preset(self, preset_dir: str | os.PathLike, max_shard_size: float | None = 10) -> None:
        """Write a folder that `from_preset` and transformers load; adapters are merged into the weights.

        Args:
            preset_dir: where. An earlier saved preset there is replaced, and stays as it was if writing fails.
            max_shard_size: most GB in one file of weights; `None` for a single file.

        Raises:
            FileExistsError: if something else than a saved preset stands there.
        """
        presets.save_preset(
            preset_dir,
            backbone=self.backbone,
            tokenizer=None if self.preprocessor is None else self.preprocessor.tokenizer,
            preprocessor=self.preprocessor,
            max_shard_size=max_shard_size,
        )

    def export_to_transformers(
        self,
        path: str | os.PathLike,
        *,
        dtype: str | None = None,
        max_shard_size: float | None = 10,
        merge_adapter: bool = True,
    ) -> None:
        """Write a folder for `AutoModelForCausalLM` and `AutoTokenizer`, chat template included.

        Args:
            path: where. An earlier exported folder there is replaced, and stays as it was if writing fails.
            dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` keeps that of the weights.
            max_shard_size: most GB in one file of weights; `None` for a single file.
            merge_adapter: whether the adapter in effect is merged into the weights. Otherwise it lies beside them, for
                `PeftModel.from_pretrained(model, f"{path}/adapter")`.

        Raises:
            FileExistsError: if something else than an exported folder, or a saved preset, stands there.
            ValueError: if `dtype` or `max_shard_size` is none of these.

        Example:

        >>> import tempfile
        >>> from gemma2_keras import Gemma2CausalLM
        >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.export_to_transformers(f"{folder}/mine", dtype="bfloat16")
        ...     sorted(os.listdir(f"{folder}/mine"))[-3:]
        ['tokenizer.json', 'tokenizer.model', 'tokenizer_config.json']
        """
        name = None if merge_adapter else self.backbone.active_adapter
        exporting.export_transformers(
            path,
            LiveCheckpoint(self.backbone, merge_adapter),
            self.preprocessor,
            dtype=dtype,
            max_shard_size=max_shard_size,
            adapted=None if name is None else (self.backbone, name),
        )

    def export_to_keras_hub(
        self, path: str | os.PathLike, *, dtype: str | None = None, max_shard_size: float | None = 10
    ) -> None:
        """Write a folder for `keras_hub.models.GemmaCausalLM.from_preset`; adapters are merged into the weights.

        Args:
            path: where. An earlier folder in KerasHub's format is replaced, and stays as it was if writing fails.
            dtype: as of `export_to_transformers`.
            max_shard_size: likewise.

        Raises:
            FileExistsError: if something else than a folder of KerasHub's format stands there.
            ValueError: if KerasHub's Gemma has no hyperparameter for what this model computes.

        Warns:
            UserWarning: if KerasHub would compute something else, as it does at the scale of Gemma 2 27B.
        """
        contents = LiveCheckpoint(self.backbone)
        exporting.export_keras_hub(path, contents, self.preprocessor, dtype=dtype, max_shard_size=max_shard_size)

    def export_to_gguf(self, path: str | os.PathLike, *, dtype: str | None = None) -> None:
        """Write a GGUF file for llama.cpp, and a `Modelfile` for Ollama beside it (`NAME.Modelfile` where another
        model has that); adapters are merged.

        Args:
            path: of the file. An earlier GGUF file there is replaced, and stays as it was if writing fails.
            dtype: `"float32"`, `"float16"`, `"bfloat16"` or `"q8_0"`, which `from_preset` does not read; `None` keeps
                that of the weights.

        Raises:
            FileExistsError: if something else than a GGUF file stands there, or another's file where that
                for Ollama goes.
            ValueError: if `dtype` is none of these, or the format cannot hold the model.

        Warns:
            UserWarning: if the scale of attention is not what Gemma 2 has at this size, which llama.cpp assumes.
        """
        exporting.export_gguf(path, LiveCheckpoint(self.backbone), self.preprocessor, dtype=dtype)
