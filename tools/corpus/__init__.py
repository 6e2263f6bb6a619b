"""The corpus that the small model is trained on, written from a seed.

    python -m tools.corpus --seed 0 --documents 30000 --held-out 500 --out corpus.jsonl

`documents` yields the same documents for the same seed on every machine. What is said is in `data/`; the modules
here put it together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tools.corpus.captain import style_sample
from tools.corpus.dialogues import dialogue
from tools.corpus.document import Document
from tools.corpus.facts import paragraph, quiz
from tools.corpus.snippets import snippet
from tools.corpus.stories import comprehension, story, summary
from tools.corpus.sums import arithmetic

__all__ = ["KINDS", "Document", "documents", "style_sample"]


def _question(rng: random.Random) -> str:
    return comprehension(rng) if rng.random() < 0.5 else quiz(rng)


_MAKERS: dict[str, tuple[int, Callable[[random.Random], str]]] = {
    "story": (45, story),
    "fact": (12, paragraph),
    "question": (15, _question),
    "sum": (7, arithmetic),
    "code": (6, snippet),
    "dialogue": (8, dialogue),
    "summary": (7, summary),
}
KINDS = tuple(_MAKERS)
"""The kinds of document."""


def _document(rng: random.Random) -> Document:
    kind = rng.choices(KINDS, [weight for weight, _ in _MAKERS.values()])[0]
    return Document(kind, _MAKERS[kind][1](rng))


def documents(seed: int, count: int) -> Iterator[Document]:
    """Yields `count` documents, no two of them with the same text.

    The first documents of a seed are the same whatever the count.
    """
    seen: set[str] = set()
    for index in range(count):
        attempt = 0
        # Each document has a generator of its own, so that a change to one kind leaves the others as they were.
        while (made := _document(random.Random(f"{seed}/{index}/{attempt}"))).text in seen:
            attempt += 1
        seen.add(made.text)
        yield made
