"""Short conversations of two people about everyday subjects, from `data/dialogues.txt`."""

from __future__ import annotations

import random

from tools.corpus.stories import cast, load, tell


def dialogue(rng: random.Random) -> str:
    """Returns a conversation, one turn a line, each after its speaker's name."""
    _, plots = load("dialogues.txt")
    plot = rng.choice(plots)
    slots = cast(rng, plot)
    speakers = (slots["name"], slots["friend"])
    turns = tell(rng, plot, slots)
    return "\n".join(f"{speakers[index % 2]}: {turn}" for index, turn in enumerate(turns))
