"""Train the small preset `gemma2_tiny_en` from nothing: corpus, tokenizer, model, loss curve.

    python -m tools.train_tiny

writes `presets/gemma2_tiny_en/`. The corpus, the tokenizer, the first weights and the order of the data all come from
one seed; about forty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "gemma2_tiny_en"
VOCABULARY_SIZE = 2560
# No two sizes coincide, so that the preset tries what a larger model would: heads times head size is not the width, the
# attention scalar is not the head size, the layers are odd in number, and the window is a quarter of the context.
ARCHITECTURE = {
    "num_layers": 5,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 160,
    "intermediate_dim": 448,
    "head_dim": 48,
    "query_pre_attention_scalar": 40,
    "sliding_window_size": 64,
    "context_length": 256,
}


def rows_of(documents, tokenizer, length: int):
    """Documents packed into rows of `length` tokens; each row begins with a document, and its last one may be cut."""
    import numpy as np

    rows, row = [], []
    for document in documents:
        row += [tokenizer.start_token_id, *tokenizer.encode(document), tokenizer.end_token_id]
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    return np.asarray(rows, "int32")


def train(out: Path, seed: int, steps: int, batch_size: int, learning_rate: float) -> None:
    """Train and write the preset."""
    import keras
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from gemma2_keras import (
        Gemma2Backbone,
        Gemma2CausalLM,
        Gemma2CausalLMPreprocessor,
        Gemma2Tokenizer,
        RunHistory,
        plot_history,
    )
    from tools.corpus import documents
    from tools.train_tokenizer import train_tokenizer

    keras.utils.set_random_seed(seed)
    length = ARCHITECTURE["context_length"]
    print("Writing the corpus …", flush=True)
    # Rows hold about two documents each.
    texts = [document.text for document in documents(seed, int(steps * batch_size * 2.6))]
    held_out = [document.text for document in documents(seed + 1, 800)]
    seen = set(texts)
    held_out = [text for text in held_out if text not in seen]
    print("Training the tokenizer …", flush=True)
    proto = train_tokenizer(random.Random(seed).sample(texts, min(len(texts), 20_000)), VOCABULARY_SIZE)
    tokenizer = Gemma2Tokenizer(proto)
    rows, test = rows_of(texts, tokenizer, length + 1), rows_of(held_out, tokenizer, length + 1)
    steps = min(steps, len(rows) // batch_size)
    rows = rows[: steps * batch_size]
    print(f"{rows.size:,} tokens in {steps} steps of {batch_size} x {length}.", flush=True)

    backbone = Gemma2Backbone(vocabulary_size=VOCABULARY_SIZE, **ARCHITECTURE)
    model = Gemma2CausalLM(backbone)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, alpha=0.02, warmup_target=learning_rate, warmup_steps=min(100, steps // 10)
    )
    # Without XLA, which would use one core of a CPU.
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.05, beta_2=0.98, clipnorm=1.0)
    model.compile(optimizer=optimizer, jit_compile=False)
    log = RunHistory()
    x, test_x = ({"token_ids": x[:, :-1], "padding_mask": np.ones_like(x[:, :-1])} for x in (rows, test))
    model.fit(x, rows[:, 1:], batch_size=batch_size, validation_data=(test_x, test[:, 1:]), callbacks=[log])
    results = log.noted.history
    test_loss, test_accuracy = results["val_loss"][-1], results["val_sparse_categorical_accuracy"][-1]
    print(f"Held-out loss {test_loss:.3f}, next token right {test_accuracy:.1%}.", flush=True)

    model.preprocessor = Gemma2CausalLMPreprocessor(tokenizer, sequence_length=length)
    model.save_to_preset(out)
    # Shipped in half the size: the configuration says float32, and so it is loaded.
    weights = load_file(out / "model.safetensors")
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    record = {"seed": seed, "steps": steps, "batch_size": batch_size, "held_out_loss": round(float(test_loss), 4)}
    record["held_out_accuracy"] = round(float(test_accuracy), 4)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    plot_history(log.noted, out / "training_loss.png", f"Training {NAME}")
    model = Gemma2CausalLM.from_preset(str(out))
    for prompt in ("Once upon a time", "The sun is", "Question: What is the capital of France?\nAnswer:", "7 + 5 ="):
        print("---", model.generate(prompt, max_new_tokens=60), sep="\n", flush=True)


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description="Train the small preset from nothing.")
    parser.add_argument("--out", type=Path, default=ROOT / "presets" / NAME, help="folder of the preset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    # The fastest backend for this model on a CPU.
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    train(arguments.out, arguments.seed, arguments.steps, arguments.batch_size, arguments.learning_rate)


if __name__ == "__main__":
    main()
