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


# One step of plain gradient descent shows the gradients on every backend.
KINDS = {
    "LoRA": {"lora_alpha": 10},
    "rsLoRA": {"lora_alpha": 3, "use_rslora": True},
    "DoRA": {"lora_alpha": 6, "use_dora": True},
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(reference):
    return reference.make({"num_hidden_layers": 2}, matrix_std=0.1)


def random_peft(reference, **options):
    """PEFT's adapters on a model of transformers', far from where they start."""
    theirs = peft.get_peft_model(base(reference), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return theirs


def arrays(model):
    """Each trainable weight by the name that PEFT gives it."""
    found = {}
    for module, layer in model.backbone.linear_layers().items():
        if layer.adapter is not None:
            for part, variable in layer.adapter.variables.items():
                ending = {"lora_a": "lora_A.default", "lora_b": "lora_B.default"}.get(
                    part, "lora_magnitude_vector.default"
                )
                found[f"base_model.model.{module}.{ending}.weight"] = np.array(keras.ops.convert_to_numpy(variable))
    return found


def their_gradients(theirs, reference):
    x, y = (part[0] for part in batches(reference))
    logits = theirs(torch.tensor(x).long(), use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(y).long().flatten()).backward()
    return {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.requires_grad}


def our_gradients(model, reference):
    model.compile(
        keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True), weighted_metrics=None
    )
    before = arrays(model)
    x, y = (part[0] for part in batches(reference))
    model.fit({"token_ids": x, "padding_mask": np.ones_like(x)}, y, batch_size=len(x), verbose=0)
    after = arrays(model)
    return {name: before[name] - after[name] for name in before}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_give_its_logits_and_gradients_here_and_there(
    kind, reference, ours, logits_of, tmp_path, record_property
):
    theirs = random_peft(reference, r=RANK, target_modules=ALL, **KINDS[kind])
    theirs.save_pretrained(tmp_path / "theirs")
    model = ours(base(reference))
    token_ids = reference.ids(2, 12, seed=4)
    plain, expected = reference.logits(base(reference), token_ids), reference.logits(theirs, token_ids)
    model.load_adapter(tmp_path / "theirs", trainable=True)
    error = np.abs(logits_of(model, token_ids) - expected).max()
    assert np.abs(expected - plain).max() > 0.5
    assert error <= 1e-4

    gradients, found = their_gradients(theirs, reference), our_gradients(model, reference)
    assert gradients.keys() == found.keys()
    errors = {name: np.abs(gradients[name] - found[name]).max() for name in gradients}
    assert max(errors.values()) <= 1e-4, errors
    assert max(np.abs(gradient).max() for gradient in gradients.values()) > 1e-2

    # After the step, back to transformers.
    model.save_adapter(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(reference), tmp_path / "ours").eval()
    returned = np.abs(
        reference.logits(again, token_ids) - logits_of(ours_again(ours, reference, tmp_path), token_ids)
    ).max()
    assert returned <= 1e-4
    for name, value in arrays(model).items():
        np.testing.assert_array_equal(dict(again.named_parameters())[name].detach().numpy(), value)
    record_property("logits", float(error))
    record_property("gradients", float(max(errors.values())))
    record_property("returned", float(returned))


def ours_again(ours, reference, folder):
    model = ours(base(reference))
    model.load_adapter(folder / "ours", name="again")
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 5}},
        {"target_modules": r".*layers\.1\..*(q|down)_proj", "alpha_pattern": {"^model.layers.1.*down_proj": 7}},
        {"target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": [1], "exclude_modules": ["v_proj"]},
        {"target_modules": ["k_proj", "absent"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ALL, "exclude_modules": r".*\.mlp\..*", "init_lora_weights": "orthogonal"},
    ],
    ids=["all, ranks", "expression, alphas", "layers, excluded", "one layer", "excluded by expression"],
)
def test_other_configurations_of_peft(options, reference, ours, logits_of, tmp_path):
    theirs = random_peft(reference, r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=True, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    model = ours(base(reference))
    token_ids = reference.ids(2, 12, seed=4)
    expected = reference.logits(theirs, token_ids)
    model.load_adapter(tmp_path / "theirs")
    assert np.abs(logits_of(model, token_ids) - expected).max() <= 1e-4
    model.save_adapter(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(reference), tmp_path / "ours").eval()
    np.testing.assert_allclose(reference.logits(again, token_ids), expected, atol=1e-5)
