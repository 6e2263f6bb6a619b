"""The main job from end to end: load a preset, generate, fine-tune with LoRA, generate again, save, reload.

Run it by `bash tools/quickstart`, which makes the environment first.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from gemma2_keras.cli import quiet_imports

ROOT = Path(__file__).resolve().parents[1]
PRESET = "gemma2_tiny_en"
SAMPLE = ROOT / "notebooks" / "data" / "pirate.jsonl"
OUTPUT = ROOT / "quickstart-output"
RANK = 8
# All projections: so small a model has little to spare in two of them.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATE = 2e-3
BATCH_SIZE = 8
# Small data is gone through until about so many steps are made.
STEPS = 200
SHOWN = 3


class Example(NamedTuple):
    """One text to learn from: the response, given the prompt; plain text has an empty prompt."""

    prompt: str
    response: str


def read_examples(path: Path) -> list[Example]:
    """The examples of a file: paragraphs of plain text, or JSON lines as `gemma2_keras.read_jsonl` takes them.

    Raises:
        ValueError: says what is wrong with the file, and in which line.
        OSError: if it cannot be read.
    """
    with quiet_imports():
        from gemma2_keras import read_jsonl

    if path.suffix in (".jsonl", ".json"):
        records = read_jsonl(path)
        if "messages" in records[0]:
            raise ValueError(
                f"{path} has conversations, for an instruction-tuned preset: gemma2-keras finetune --data {path}"
            )
        examples = [Example(*record.values()) if len(record) > 1 else Example("", record["text"]) for record in records]
    else:
        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: byte {error.start}.") from error
        examples = [Example("", part.strip()) for part in content.split("\n\n") if part.strip()]
    if len(examples) <= SHOWN:
        raise ValueError(f"{path} has {len(examples)} examples; at least {SHOWN + 1} are needed.")
    return examples


def run(data: Path) -> None:
    """Do the job on one file of examples."""
    start = time.perf_counter()
    examples = read_examples(data)
    with quiet_imports():
        import keras

        from gemma2_keras import Gemma2CausalLM, Gemma2CausalLMPreprocessor, RunHistory, plot_history

    keras.utils.set_random_seed(0)
    preprocessor = Gemma2CausalLMPreprocessor.from_preset(PRESET)
    model = Gemma2CausalLM.from_preset(PRESET, preprocessor=preprocessor)
    print(f"Loaded {PRESET} ({model.count_params():,} parameters) on {keras.backend.backend()}.")
    print(f"\n{model.generate('Once upon a time', max_new_tokens=80)}\n")
    print(f"First text after {time.perf_counter() - start:.1f} s.\n")

    # The last examples are kept back, to ask the model what it was not shown.
    examples, asked = examples[:-SHOWN], examples[-SHOWN:]
    prompts = [example.prompt or _opening(example.response) for example in asked]
    before = model.generate(prompts, max_new_tokens=48, strip_prompt=True)

    if any(example.prompt for example in examples):
        texts = {"prompts": [e.prompt for e in examples], "responses": [e.response for e in examples]}
    else:
        texts = [example.response for example in examples]
    # Padded to the longest example rather than to the whole context.
    longest = max(len(preprocessor.tokenizer.encode(e.prompt + e.response)) for e in examples) + 4
    preprocessor.sequence_length = min(longest, model.backbone.config.context_length)
    model.enable_lora(rank=RANK, targets=TARGETS)
    trained = sum(int(keras.ops.size(weight)) for weight in model.trainable_weights)
    print(f"Fine-tuning {trained:,} adapter weights on {len(examples)} examples of {data.name}:")
    log = RunHistory()
    model.compile(optimizer=keras.optimizers.Adam(LEARNING_RATE))
    epochs = max(1, round(STEPS / -(-len(examples) // BATCH_SIZE)))
    model.fit(texts, batch_size=BATCH_SIZE, epochs=epochs, callbacks=[log], verbose=1)
    after = model.generate(prompts, max_new_tokens=48, strip_prompt=True)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print(f"\n{prompt}\n  before: {_first_line(old)}\n  after:  {_first_line(new)}")

    OUTPUT.mkdir(exist_ok=True)
    plot_history(log.noted, OUTPUT / "loss.png", f"LoRA fine-tuning of {PRESET} on {data.name}")
    model.save_to_preset(OUTPUT / "model")
    reloaded = Gemma2CausalLM.from_preset(OUTPUT / "model")
    again = reloaded.generate(prompts, max_new_tokens=48, strip_prompt=True)
    if again != after:
        raise ValueError("The model that was saved does not write what the model in memory writes.")
    print(f"\nLoss {log.noted.losses[0]:.2f} -> {log.noted.losses[-1]:.2f}, drawn in {OUTPUT / 'loss.png'}")
    print(f"Saved as a preset, reloaded, and the same texts came out: {OUTPUT / 'model'}")
    print(f"All in {time.perf_counter() - start:.1f} s.")


def _opening(text: str) -> str:
    """Its first words, and never all of them."""
    words = text.split()
    return " ".join(words[: max(1, min(4, len(words) // 2))])


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def main() -> int:
    """Read the arguments and do the job; what goes wrong with the data is one line."""
    parser = argparse.ArgumentParser(prog="bash tools/quickstart", description="Generate, fine-tune, generate, save.")
    parser.add_argument(
        "--data", type=Path, default=SAMPLE, metavar="FILE", help="text, or JSON lines (default: a sample)"
    )
    parser.add_argument(
        "--backend", choices=("jax", "torch", "tensorflow"), default="tensorflow", help="default: tensorflow"
    )
    options = parser.parse_args()
    os.environ["KERAS_BACKEND"] = options.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        run(options.data)
    except (ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
