"""What is measured, of whom, and how much better this package shall be."""

from __future__ import annotations

import dataclasses
from typing import Any

BACKENDS = ("torch", "jax", "tensorflow")


@dataclasses.dataclass(frozen=True)
class Contender:
    """Someone who does the work: a name of `contenders.CONTENDERS` and, for Keras, a backend."""

    name: str
    backend: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.backend}" if self.backend else self.name


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of work.

    Attributes:
        name: as in the table.
        work: in words.
        arguments: of the worker.
        measure: what counts, a key of the worker's result.
        more_is_better: whether more of it is better.
        contenders: who does it.
        goals: (contender of ours, other contender, least ratio in our favour).
        measured_with: the row whose turns give this row's figures, too; `None` if it has its own.
    """

    name: str
    work: str
    arguments: tuple[str, ...]
    measure: str
    more_is_better: bool
    contenders: tuple[Contender, ...]
    goals: tuple[tuple[str, str, float], ...]
    measured_with: str | None = None

    @property
    def source(self) -> str:
        """The row in whose name the figures are kept."""
        return self.measured_with or self.name

    def ratio(self, mine: dict[str, Any], other: dict[str, Any]) -> float:
        """How many times better `mine` is."""
        a, b = mine[self.measure], other[self.measure]
        return a / b if self.more_is_better else b / a

    def better(self, result: dict[str, Any], than: dict[str, Any]) -> bool:
        """Whether a turn was better than an earlier one."""
        return "error" not in result and self.ratio(result, than) > 1


OURS = tuple(Contender("gemma2_keras", backend) for backend in BACKENDS)
KERAS_HUB = tuple(Contender("keras_hub", backend) for backend in BACKENDS)
TRANSFORMERS = Contender("transformers")
PEFT = Contender("transformers peft")
# Whoever is compared stands next to the other, so that both find the machine in one state.
PAIRS = tuple(contender for pair in zip(OURS, KERAS_HUB, strict=True) for contender in pair)

# Rows that are measured together share these.
_LARGE = ("decode", "--size", "2b", "--dtype", "bfloat16", "--new", "24")
_LARGE_CONTENDERS = (
    Contender("llama.cpp"),
    OURS[0],
    TRANSFORMERS,
    Contender("transformers compiled"),
    KERAS_HUB[0],
    *PAIRS[2:],
)
_TRAINING = ("train", "--size", "wide")


def _goals(torch: float, jax: float, tensorflow: float, **others: float) -> tuple[tuple[str, str, float], ...]:
    against = zip(BACKENDS, (torch, jax, tensorflow), strict=True)
    pairs = [(f"gemma2_keras {backend}", f"keras_hub {backend}", goal) for backend, goal in against]
    names = {
        "transformers": "transformers",
        "sdpa": "transformers sdpa",
        "compiled": "transformers compiled",
        "peft": "transformers peft",
        "llama_cpp": "llama.cpp",
    }
    return (*pairs, *(("gemma2_keras torch", names[name], goal) for name, goal in others.items()))


ROWS = (
    Row(
        "D1",
        "decode, 2B shape, bfloat16, one prompt of 128 tokens",
        _LARGE,
        "tokens_per_s",
        True,
        _LARGE_CONTENDERS,
        _goals(3.5, 1.3, 1.3, transformers=1.5, compiled=1.4, llama_cpp=1.1),
    ),
    Row(
        "D3-128",
        "decode, mini shape, float32, one prompt of 128 tokens",
        ("decode", "--new", "64"),
        "tokens_per_s",
        True,
        (TRANSFORMERS, *PAIRS),
        _goals(5.0, 1.3, 2.2, transformers=2.0),
    ),
    Row(
        "D3-2000",
        "decode, mini shape, float32, one prompt of 2000 tokens",
        ("decode", "--prompt", "2000", "--new", "64"),
        "tokens_per_s",
        True,
        (TRANSFORMERS, Contender("transformers sdpa"), *PAIRS),
        _goals(5.0, 1.5, 2.2, transformers=2.0),
    ),
    Row(
        "D4",
        "8 prompts of 20 to 400 tokens and 32 new ones each, mini shape, float32, prefill included",
        ("ragged", "--new", "32"),
        "total_s",
        False,
        (TRANSFORMERS, *PAIRS),
        _goals(2.0, 2.0, 2.0, transformers=1.2),
    ),
    Row(
        "P1-2000",
        "prefill of 2000 tokens, mini shape, float32",
        ("decode", "--prompt", "2000", "--new", "64"),
        "prefill_s",
        False,
        (TRANSFORMERS, Contender("transformers sdpa"), *PAIRS),
        _goals(1.0, 1.0, 1.0, transformers=1.0, sdpa=1.0),
        measured_with="D3-2000",
    ),
    Row(
        "P1-128",
        "prefill of 128 tokens, 2B shape, bfloat16",
        _LARGE,
        "prefill_s",
        False,
        _LARGE_CONTENDERS,
        _goals(1.0, 1.0, 1.0, transformers=1.0, llama_cpp=1.0),
        measured_with="D1",
    ),
    Row(
        "C1",
        "20 prompts of different lengths and numbers of new tokens, mini shape, float32, from the first call on",
        ("calls",),
        "total_s",
        False,
        PAIRS,
        _goals(1.0, 5.0, 5.0),
    ),
    Row(
        "M1",
        "peak memory of building and generating, 2B shape, bfloat16",
        _LARGE,
        "peak_bytes",
        False,
        _LARGE_CONTENDERS,
        _goals(1.0, 1.67, 1.0),
        measured_with="D1",
    ),
    Row(
        "L1",
        "load a checkpoint, 2B shape, bfloat16; first call: until the first logits",
        ("load", "--size", "2b", "--dtype", "bfloat16"),
        "total_s",
        False,
        (Contender("file"), TRANSFORMERS, *OURS),
        (("gemma2_keras torch", "file", 0.67), ("gemma2_keras torch", "transformers", 1.0)),
    ),
    Row(
        "T1",
        "LoRA training step, 256,000 words, float32, 2 sequences of 512 tokens",
        _TRAINING,
        "tokens_per_s",
        True,
        (PEFT, *PAIRS),
        _goals(3.0, 1.5, 1.0, peft=2.5),
    ),
    Row(
        "T1-memory",
        "peak memory of that training above the model's, bytes",
        _TRAINING,
        "above_bytes",
        False,
        (PEFT, *PAIRS),
        _goals(2.86, 2.86, 2.86, peft=1.0),
        measured_with="T1",
    ),
    Row(
        "T2-memory",
        "the same with sequences of 2048 tokens",
        (*_TRAINING, "--length", "2048", "--steps", "1"),
        "above_bytes",
        False,
        (PEFT, *PAIRS),
        _goals(2.86, 2.86, 2.86, peft=1.0),
    ),
)
