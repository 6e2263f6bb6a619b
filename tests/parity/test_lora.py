"""LoRA training against transformers and PEFT."""

from __future__ import annotations

import keras
import numpy as np
import peft
import pytest
import torch

STEPS, RANK = 10, 4
# The same formula in both libraries; their Adams add epsilon at different places.
RATE, MOMENTUM = 0.5, 0.9


def batches(reference):
    # Few of the 97 tokens occur, which is something to learn.
    tokens = reference.ids(2 * STEPS, 13, vocabulary_size=5, seed=3).reshape(STEPS, 2, 13)
    return tokens[:, :, :-1], tokens[:, :, 1:]


def train_ours(model, reference):
    model.compile(
        optimizer=keras.optimizers.SGD(RATE, momentum=MOMENTUM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=None,
    )
    losses = []
    for x, y in zip(*batches(reference), strict=True):
        inputs = {"token_ids": x, "padding_mask": np.ones_like(x)}
        losses.append(model.fit(inputs, y, batch_size=len(x), verbose=0, shuffle=False).history["loss"][0])
    return losses


def train_theirs(model, reference):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE, momentum=MOMENTUM)
    losses = []
    for x, y in zip(*batches(reference), strict=True):
        logits = model(torch.tensor(x).long(), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(y).long().flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adapted(theirs, model, alpha):
    """`theirs` with PEFT's adapters, which start as those of our model."""
    settings = peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    theirs = peft.get_peft_model(theirs, settings)
    named = dict(theirs.named_parameters())
    for i, layer in enumerate(model.backbone.transformer_layers):
        for name in ("q_proj", "v_proj"):
            linear = getattr(layer.attention, name)
            for letter in "AB":
                start = keras.ops.convert_to_numpy(getattr(linear, f"lora_{letter.lower()}"))
                path = f"base_model.model.model.layers.{i}.self_attn.{name}.lora_{letter}.default.weight"
                named[path].data.copy_(torch.tensor(start))
    return theirs


@pytest.mark.parametrize("alpha", [4, 10])
def test_losses_of_training_are_those_of_peft(alpha, reference, ours):
    theirs = reference.make({"num_hidden_layers": 2}, matrix_std=0.1)
    model = ours(theirs)
    model.enable_lora(RANK, alpha=alpha)
    expected = train_theirs(adapted(theirs, model, alpha), reference)
    found = train_ours(model, reference)

    error = np.abs(np.subtract(found, expected))
    assert expected[-1] < expected[0] - 0.2  # the adapters matter
    assert error.max() <= 1e-4
