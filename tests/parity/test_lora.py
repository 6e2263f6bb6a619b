"""LoRA training against transformers and PEFT."""

from __future__ import annotations

import keras
import numpy as np
import peft
import pytest
import torch

STEPS, RANK, RATE = 10, 4, 3e-2


@pytest.fixture(scope="module")
def theirs(reference):
    return reference.make({"num_hidden_layers": 2}, matrix_std=0.3)


def batches(reference):
    tokens = reference.ids(2 * STEPS, 13, seed=3).reshape(STEPS, 2, 13)
    return tokens[:, :, :-1], tokens[:, :, 1:]


def train_ours(model, reference):
    model.compile(
        optimizer=keras.optimizers.Adam(RATE, epsilon=1e-8),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=None,
    )
    losses = []
    for x, y in zip(*batches(reference), strict=True):
        inputs = {"token_ids": x, "padding_mask": np.ones_like(x)}
        losses.append(model.fit(inputs, y, batch_size=len(x), verbose=0, shuffle=False).history["loss"][0])
    return losses


def train_theirs(model, reference):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE, eps=1e-8)
    losses = []
    for x, y in zip(*batches(reference), strict=True):
        logits = model(torch.tensor(x).long(), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(y).long().flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adapted(theirs, model):
    """`theirs` with PEFT's adapters, which start as those of our model."""
    settings = peft.LoraConfig(r=RANK, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
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


def test_losses_of_training_are_those_of_peft(theirs, reference, ours, record_property):
    model = ours(theirs)
    model.enable_lora(RANK, alpha=4)
    expected = train_theirs(adapted(theirs, model), reference)
    found = train_ours(model, reference)

    error = np.abs(np.subtract(found, expected))
    record_property("max_error", float(error.max()))
    record_property("losses", [round(x, 4) for x in expected])
    assert error.max() <= 1e-4
