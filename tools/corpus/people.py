"""Who the corpus is about: names, pronouns, animals and where they live."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"


def _load() -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    for line in (DATA / "lists.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, words = line.partition(": ")
            lists[name] = words.split(" | ") if " | " in words else words.split()
    return lists


LISTS = _load()
"""The lists of `data/lists.txt`."""
GIRLS, BOYS, ANIMAL_NAMES, SPECIES = (LISTS[name] for name in ("girls", "boys", "animal_names", "species"))
CHILD_HOMES, CHILD_TRAITS = LISTS["child_homes"], LISTS["child_traits"]
ANIMAL_HOMES, ANIMAL_TRAITS = LISTS["animal_homes"], LISTS["animal_traits"]
GIRL_RELATIVES = ("grandmother", "mother", "aunt", "big sister")
BOY_RELATIVES = ("grandfather", "father", "uncle", "big brother")


@dataclass(frozen=True)
class Pronouns:
    """The pronouns of one person."""

    he: str
    him: str
    his: str
    himself: str

    def slots(self, prefix: str = "") -> dict[str, str]:
        """Returns the pronouns as template slots: `he`, `him`, `his` and `himself` after `prefix`."""
        return {
            f"{prefix}he": self.he,
            f"{prefix}him": self.him,
            f"{prefix}his": self.his,
            f"{prefix}himself": self.himself,
        }


SHE = Pronouns("she", "her", "her", "herself")
HE = Pronouns("he", "him", "his", "himself")


def names(rng: random.Random, count: int) -> list[tuple[str, Pronouns]]:
    """Returns `count` different children's names with their pronouns."""
    chosen: dict[str, Pronouns] = {}
    while len(chosen) < count:
        girl = rng.random() < 0.5
        chosen.setdefault(rng.choice(GIRLS if girl else BOYS), SHE if girl else HE)
    return list(chosen.items())


def child_slots(rng: random.Random) -> dict[str, str]:
    """Returns the slots of a child, a friend and a grown-up who helps."""
    (name, pronouns), (friend, friend_pronouns) = names(rng, 2)
    girl = pronouns is SHE
    relative_pronouns = rng.choice((SHE, HE))
    relative = rng.choice(GIRL_RELATIVES if relative_pronouns is SHE else BOY_RELATIVES)
    return {
        "name": name,
        **pronouns.slots(),
        "kind": "girl" if girl else "boy",
        "daughter": "daughter" if girl else "son",
        "home": rng.choice(CHILD_HOMES),
        "trait": rng.choice(CHILD_TRAITS),
        "friend": friend,
        **friend_pronouns.slots("f"),
        "fkind": "girl" if friend_pronouns is SHE else "boy",
        "relative": relative,
        **relative_pronouns.slots("r"),
    }


def animal_slots(rng: random.Random) -> dict[str, str]:
    """Returns the slots of an animal, a friend and an older animal who helps."""
    name, friend = rng.sample(ANIMAL_NAMES, 2)
    kind, friend_kind = rng.sample(SPECIES, 2)
    pronouns, friend_pronouns, relative_pronouns = (rng.choice((SHE, HE)) for _ in range(3))
    return {
        "name": name,
        **pronouns.slots(),
        "kind": kind,
        "daughter": "daughter" if pronouns is SHE else "son",
        "home": rng.choice(ANIMAL_HOMES),
        "trait": rng.choice(ANIMAL_TRAITS),
        "friend": friend,
        **friend_pronouns.slots("f"),
        "fkind": friend_kind,
        "relative": rng.choice(GIRL_RELATIVES[:3] if relative_pronouns is SHE else BOY_RELATIVES[:3]),
        **relative_pronouns.slots("r"),
    }


def adult_slots(rng: random.Random) -> dict[str, str]:
    """Returns the slots of a grown-up and of a child who helps."""
    (name, pronouns), (friend, friend_pronouns) = names(rng, 2)
    return {
        "name": name,
        **pronouns.slots(),
        "kind": "woman" if pronouns is SHE else "man",
        "daughter": "daughter" if pronouns is SHE else "son",
        "home": rng.choice(CHILD_HOMES),
        "trait": rng.choice(CHILD_TRAITS),
        "friend": friend,
        **friend_pronouns.slots("f"),
        "fkind": "girl" if friend_pronouns is SHE else "boy",
        "relative": "neighbour",
        **rng.choice((SHE, HE)).slots("r"),
    }
