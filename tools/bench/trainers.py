"""Who is compared in training: adapters of rank 8 on the query and value projections, with AdamW.

Each function builds a model and returns `prepare`, which adds the adapters and returns a function that makes one step
on (B, T + 1) tokens; what memory is taken from `prepare` on is taken by training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tools.bench.contenders import keras_hub_backbone, transformers_model

Step = Callable[[np.ndarray], None]
Prepare = Callable[[], Step]
_RANK, _RATE = 8, 1e-4


def ours(shape: dict[str, Any], dtype: str) -> Prepare:
    from gemma2_keras import Gemma2Backbone, Gemma2CausalLM

    model = Gemma2CausalLM(Gemma2Backbone(**shape, dtype=dtype))

    def prepare() -> Step:
        model.enable_lora(_RANK)
        return _keras_step(model, weighted_metrics="auto")

    return prepare


def keras_hub(shape: dict[str, Any], dtype: str) -> Prepare:
    import keras_hub

    model = keras_hub.models.GemmaCausalLM(keras_hub_backbone(shape, dtype), preprocessor=None)

    def prepare() -> Step:
        model.backbone.enable_lora(_RANK)
        return _keras_step(model, weighted_metrics=[])

    return prepare


def peft(shape: dict[str, Any], dtype: str) -> Prepare:
    import torch
    from peft import LoraConfig, get_peft_model

    model = transformers_model(shape, dtype).train()

    def prepare() -> Step:
        adapted = get_peft_model(model, LoraConfig(r=_RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=_RATE)

        def step(tokens: np.ndarray) -> None:
            # As many tokens are run and predicted as by the others; transformers shifts the labels itself.
            ids = torch.from_numpy(tokens).long()
            labels = ids.clone()
            loss = adapted(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

        return step

    return prepare


TRAINERS: dict[str, Callable[..., Prepare]] = {"gemma2_keras": ours, "keras_hub": keras_hub, "transformers peft": peft}


def _keras_step(model: Any, **options: Any) -> Step:
    import keras

    model.compile(optimizer=keras.optimizers.AdamW(_RATE), **options)

    def step(tokens: np.ndarray) -> None:
        inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, :-1])}
        # On JAX an error within the step is raised where its numbers are read.
        np.asarray(model.train_on_batch(inputs, tokens[:, 1:]))

    return step
