"""A recipe carried out: what `gemma2-keras finetune` does."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from gemma2_keras.checkpoints import adapters, hub, presets
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.checkpoints.saving import check_place, check_writable
from gemma2_keras.errors import InputError
from gemma2_keras.models.adapters import chosen_modules
from gemma2_keras.preprocessing.causal_lm_preprocessor import Gemma2CausalLMPreprocessor
from gemma2_keras.tasks.causal_lm import Gemma2CausalLM
from gemma2_keras.training.fine_tuning import fine_tune
from gemma2_keras.training.jsonl import read_jsonl
from gemma2_keras.training.optimizers import adamw
from gemma2_keras.training.plotting import plot_history
from gemma2_keras.training.preparation import PreparedDataset, prepare
from gemma2_keras.training.recipe import Recipe
from gemma2_keras.training.run_folder import RunFolder


def run_recipe(recipe: Recipe, verbose: Any = "auto") -> str:
    """Fine-tune as a recipe says, print how it went, and save the result.

    All that can be wrong is looked for before the weights are loaded: files, folders, names and data.

    Args:
        recipe: what to do; `data` and `output` must be given.
        verbose: as `fine_tune` takes it.

    Returns:
        The line of Python that loads what was saved.

    Raises:
        ValueError: if a setting, a file of data, or the preset is not what it should be.
        OSError: if a file cannot be read, or a place cannot be written to.
        ImportError: if a picture is asked for, and matplotlib is not installed.
        KeyboardInterrupt: at Ctrl-C; the run folder then holds a checkpoint, from which `resume` goes on.

    Example:

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     data = Path(folder) / "data.jsonl"
    ...     _ = data.write_text('{"prompt": "The cat", "response": " sleeps."}')
    ...     _ = run_recipe(Recipe(data=str(data), output=f"{folder}/adapter"), verbose=0)  # doctest: +ELLIPSIS
    ...     sorted(os.listdir(f"{folder}/adapter"))
    Training: 1 example
    ...
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    records, held_out = _records(recipe)
    _check_places(recipe)
    _check_model(recipe)
    preprocessor = Gemma2CausalLMPreprocessor.from_preset(recipe.preset)
    data = _prepared("Training", records, preprocessor, recipe)
    validation = _prepared("Validation", held_out, preprocessor, recipe) if held_out else None

    keras.utils.set_random_seed(recipe.seed)
    model = Gemma2CausalLM.from_preset(recipe.preset, dtype=recipe.dtype, preprocessor=preprocessor)
    if recipe.train == "adapter":
        model.enable_lora(
            recipe.rank,
            recipe.targets,
            recipe.alpha,
            recipe.dropout,
            use_rslora=recipe.use_rslora,
            use_dora=recipe.use_dora,
        )
    accumulated = recipe.gradient_accumulation_steps
    optimizer = adamw(
        data,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        warmup=recipe.warmup,
        weight_decay=recipe.weight_decay,
        global_clipnorm=recipe.global_clipnorm,
        gradient_accumulation_steps=accumulated if accumulated > 1 else None,
    )
    model.compile(optimizer, remat=recipe.remat)
    trained = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    print(f"{recipe.preset}: {trained:,} of {model.count_params():,} weights are trained.")

    before = _measured(model, validation)
    if before:
        print(f"Validation before training: loss {before['loss']:.4g}, perplexity {before['perplexity']:.4g}")
    history = fine_tune(
        model,
        data,
        epochs=recipe.epochs,
        validation_data=validation,
        folder=recipe.run_folder,
        resume=recipe.resume,
        every_minutes=recipe.every_minutes,
        verbose=verbose,
    )
    load = _save(model, recipe)
    # Measured anew: a run that is resumed may have been measured on other data.
    after = _measured(model, validation)
    if after:
        changes = (f"{name} {before[name]:.4g} -> {after[name]:.4g}" for name in ("loss", "perplexity"))
        print(f"Validation before and after: {', '.join(changes)}")
    else:
        print(f"Training loss: {history.losses[0]:.4g} -> {history.losses[-1]:.4g} (no `validation` was given)")
    if recipe.plot is not None:
        plot_history(history, recipe.plot, f"{recipe.preset} on {Path(str(recipe.data)).name}")
        print(f"The curve is drawn in {recipe.plot}")
    print(f"The {'adapter' if recipe.train == 'adapter' else 'model'} is in {recipe.output}; to load it:\n\n{load}\n")
    return load


def _records(recipe: Recipe) -> tuple[list[Any], list[Any]]:
    """The examples to train on, and those to measure on."""
    for name, what in (("data", "a file of JSON lines"), ("output", "a folder for the result")):
        if getattr(recipe, name) is None:
            raise InputError(f"`{name}` is missing: name {what}.")
    records = read_jsonl(str(recipe.data))
    if recipe.validation is not None:
        return records, read_jsonl(recipe.validation)
    if not recipe.validation_split:
        return records, []
    held_out = max(1, round(len(records) * recipe.validation_split))
    if held_out >= len(records):
        raise InputError(
            f"`validation_split={recipe.validation_split:g}` leaves nothing of {len(records)} examples to train on."
        )
    order = np.random.default_rng(recipe.seed).permutation(len(records))
    return [records[i] for i in sorted(order[held_out:])], [records[i] for i in sorted(order[:held_out])]


def _check_places(recipe: Recipe) -> None:
    """See to it that what is made will find its place."""
    output = os.path.abspath(str(recipe.output))
    if recipe.train == "adapter":
        check_place(output, adapters.CONFIG_FILE, "adapter")
    else:
        check_place(output, hub.OWN_FILE)
    if recipe.run_folder is not None:
        run = RunFolder(recipe.run_folder)
        if run.path.is_relative_to(output):
            raise InputError(
                f"`run_folder` {recipe.run_folder} lies in `output` {recipe.output}, which is written as a whole: "
                "choose another one."
            )
        if not recipe.resume:
            run.refuse_a_run()
        check_writable(run.path)
    if recipe.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError('`plot` needs matplotlib: pip install "gemma2-keras[plot]".')
        if os.path.isdir(recipe.plot):
            raise IsADirectoryError(f"`plot` must be a file; {recipe.plot} is a folder.")
        check_writable(Path(os.path.abspath(recipe.plot)).parent)


def _check_model(recipe: Recipe) -> None:
    """See to it that the preset is whole, and that what shall be trained is there, and can be."""
    config, dtype = presets.inspect_checkpoint(recipe.preset)
    if not presets.has_tokenizer(recipe.preset):
        raise InputError(
            f"{recipe.preset} has no tokenizer, so that it cannot read the data: put its `tokenizer.model` there."
        )
    variable_dtype = keras.dtype_policies.get(recipe.dtype or dtype).variable_dtype
    if recipe.train == "all":
        if variable_dtype != "float32":
            raise InputError(
                f"`train: all` needs weights of float32: AdamW computes in their dtype, and in {variable_dtype} its "
                "steps are lost. Choose `dtype: mixed_bfloat16`, which keeps them so and multiplies in bfloat16."
            )
        return
    modules = [name.removesuffix(".weight") for name in weight_map(config) if name.endswith("_proj.weight")]
    chosen_modules(recipe.targets, modules)


def _prepared(
    title: str, records: list[Any], preprocessor: Gemma2CausalLMPreprocessor, recipe: Recipe
) -> PreparedDataset:
    dataset = prepare(
        records,
        preprocessor,
        recipe.sequence_length,
        recipe.batch_size,
        packing=recipe.packing,
        truncation=recipe.truncation,
        shuffle=title == "Training",
        seed=recipe.seed,
    )
    print(f"{title}: {dataset.report!r}".replace("\n", "\n    "))
    return dataset


def _save(model: Gemma2CausalLM, recipe: Recipe) -> str:
    """Save what was trained; returns the line of Python that loads it."""
    output, start = str(recipe.output), "from gemma2_keras import Gemma2CausalLM; model = Gemma2CausalLM.from_preset"
    dtype = "" if recipe.dtype is None else f", dtype={recipe.dtype!r}"
    if recipe.train == "adapter":
        model.save_adapter(output)
        return f"{start}({recipe.preset!r}{dtype}); model.load_adapter({output!r})"
    model.save_to_preset(output)
    return f"{start}({output!r}{dtype})"


def _measured(model: Gemma2CausalLM, validation: PreparedDataset | None) -> dict[str, float]:
    """Loss and perplexity; nothing without data to measure on."""
    if validation is None:
        return {}
    return model.evaluate(validation, verbose=0, return_dict=True)
