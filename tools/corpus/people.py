"""Who the corpus is about: names, pronouns, animals and where they live."""

from __future__ import annotations

import random
from dataclasses import dataclass

GIRLS = (
    "Mia Anna Lucy Emma Rosa Clara Nora Ella Ruby Alice Grace Maya Leila Sofia Ivy Hanna Zoe Amira Lena Tara Julia "
    "Eva Molly Daisy Olga Priya Yuki Carmen Nina Beth Fatima Ines Marta Freya Kate Lily Poppy Sara Elsa Wendy Mei "
    "Aisha Dora Flora Greta Heidi Iris Jane Kira Luna Paula Rita Sally Tess Violet Willa Amy Helen Sunita Nadia"
).split()
BOYS = (
    "Tom Ben Sam Leo Max Jack Omar Finn Noah Adam Theo Hugo Luca Ravi Oscar Paul Peter Nico Ali Daniel Eric Felix "
    "George Henry Ivan Jonas Karl Liam Marco Ned Otto Pablo Rory Simon Toby Victor Will Yusuf Alex Arjun Bruno Carlos "
    "David Emil Frank Hassan Isaac Jamal Kenji Lewis Martin Nils Owen Philip Robin Stefan Tim Walter Zack Kofi"
).split()
ANIMAL_NAMES = (
    "Pip Hazel Bramble Clover Pepper Nutmeg Willow Button Acorn Fern Thistle Moss Biscuit Juniper Pebble Rusty Dusty "
    "Sorrel Maple Ginger Bracken Tansy Teasel Rowan Berry Barley Conker Cricket Dapple Ember Fidget Muffin Oats Patch "
    "Quill Ripple Sandy Tumble Twig Whisper"
).split()
SPECIES = "rabbit fox hedgehog mouse squirrel badger otter raccoon mole beaver".split()
CHILD_HOMES = (
    "in a small village by the sea",
    "in a tall house at the end of a quiet lane",
    "on a farm near the green hills",
    "in a little town beside a wide river",
    "in a busy city full of bright lights",
    "in a stone cottage at the edge of the forest",
    "in a flat above a bakery",
    "on an island with a white lighthouse",
    "in a valley between two mountains",
    "near an old windmill",
    "in a narrow street behind the market",
    "in a wooden house beside a lake",
    "next door to the village school",
    "in a yellow house on top of a hill",
)
ANIMAL_HOMES = (
    "under the roots of an old oak tree",
    "beside a clear stream",
    "at the edge of a sunny meadow",
    "in the middle of a deep green forest",
    "behind a mossy stone wall",
    "near a quiet pond",
    "in a cosy den on a hillside",
    "among the tall ferns",
    "beneath a blackberry bush",
    "at the bottom of a wild garden",
)
CHILD_TRAITS = "kind curious quiet cheerful clever brave shy thoughtful patient lively gentle hopeful busy careful".split()
ANIMAL_TRAITS = "small young curious gentle lively shy clever cheerful brave busy friendly hungry".split()
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
