"""Short stories, and the summaries and questions that belong to them.

The plots are in `data/stories.txt`. A story takes one plot, one row of each of its tables and one alternative of each
of its beats; what the rows say holds all through the story, so that a summary or an answer made of them is true.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache

from tools.corpus import people
from tools.corpus.people import DATA
from tools.corpus.text import Slots, expand, sample_text, title_case, word_count

SHORTEST, LONGEST = 60, 160
_CASTS = {"child": people.child_slots, "animal": people.animal_slots, "adult": people.adult_slots}
_PALS = {"child": "{his} friend {friend}", "animal": "{friend} the {fkind}", "adult": "a {fkind} called {friend}"}


@dataclass
class Beat:
    """One step of a plot."""

    optional: bool
    alternatives: list[str] = field(default_factory=list)


@dataclass
class Plot:
    """A plot as `data/stories.txt` gives it."""

    name: str
    heroes: list[str] = field(default_factory=list)
    species: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    tables: list[list[dict[str, str]]] = field(default_factory=list)
    beats: list[Beat] = field(default_factory=list)
    summaries: list[str] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Story:
    """A finished story with what is true of it."""

    plot: str
    title: str
    text: str
    summary: str
    questions: tuple[tuple[str, str], ...]


@cache
def load(file: str = "stories.txt") -> tuple[dict[str, list[str]], list[Plot]]:
    """Returns the opening sentences by kind of hero, and the plots, of one file.

    Raises:
        ValueError: A line of the file is none of those that it may hold.
    """
    openings: dict[str, list[str]] = {}
    plots: list[Plot] = []
    target: list[str] = []
    for number, line in enumerate((DATA / file).read_text(encoding="utf-8").splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        plot = plots[-1] if plots else Plot("")
        if line.startswith("== intro "):
            target = openings.setdefault(line.removeprefix("== intro "), [])
        elif line.startswith("== plot "):
            plots.append(Plot(line.removeprefix("== plot ")))
        elif word == "hero":
            plot.heroes = rest.split()
        elif word == "species":
            plot.species = rest.split()
        elif word == "title":
            plot.titles.append(rest)
        elif word == "rows":
            plot.tables.append([])
        elif word == "*":
            cells = (cell.partition("=") for cell in rest.split("; "))
            plot.tables[-1].append({key: value for key, _, value in cells})
        elif word in ("beat", "beat?"):
            plot.beats.append(Beat(optional=word == "beat?"))
            target = plot.beats[-1].alternatives
        elif word == "-":
            target.append(rest)
        elif word == "sum":
            plot.summaries.append(rest)
        elif word == "ask":
            question, _, answer = rest.partition(" => ")
            plot.questions.append((question, answer))
        else:
            raise ValueError(f"data/{file}, line {number}: {line!r} is not understood.")
    return openings, plots


def cast(rng: random.Random, plot: Plot) -> dict[str, str]:
    """Returns the slots of one telling of a plot: who is in it, and one row of each of its tables."""
    openings, _ = load()
    hero = rng.choice(plot.heroes)
    slots = _CASTS[hero](rng)
    if plot.species:
        slots["kind"] = rng.choice([species for species in plot.species if species != slots["fkind"]])
    slots["pal"] = expand(_PALS[hero], rng, slots, phrase=True)
    slots["intro"] = sample_text(rng, openings[hero], slots)
    for table in plot.tables:
        # A row's values may name slots and hold alternatives: they are settled here, once for the whole text.
        for key, value in rng.choice(table).items():
            slots[key] = expand(value, rng, slots, phrase=True)
    return slots


def tell(rng: random.Random, plot: Plot, slots: Slots) -> list[str]:
    """Returns the beats of one telling of a plot."""
    return [
        sample_text(rng, beat.alternatives, slots) for beat in plot.beats if not (beat.optional and rng.random() < 0.5)
    ]


def _finish(rng: random.Random, plot: Plot, slots: Slots, text: str) -> Story:
    return Story(
        plot=plot.name,
        title=title_case(sample_text(rng, plot.titles, slots)),
        text=text,
        summary=sample_text(rng, plot.summaries, slots),
        questions=tuple(
            (expand(question, rng, slots), expand(answer, rng, slots)) for question, answer in plot.questions
        ),
    )


def make_story(rng: random.Random, longest: int = LONGEST) -> Story:
    """Returns a story of `SHORTEST` to `longest` words."""
    _, plots = load()
    while True:
        plot = rng.choice(plots)
        slots = cast(rng, plot)
        beats = tell(rng, plot, slots)
        text = " ".join(beats)
        if not SHORTEST <= word_count(text) <= longest:
            continue
        if rng.random() < 0.5:
            # Two paragraphs, parted where the trouble has begun.
            middle = rng.randint(2, len(beats) - 2)
            text = " ".join(beats[:middle]) + "\n\n" + " ".join(beats[middle:])
        return _finish(rng, plot, slots, text)


def make_scene(rng: random.Random) -> Story:
    """Returns a short passage with plain facts: numbers, days, places."""
    _, plots = load("scenes.txt")
    plot = rng.choice(plots)
    slots = cast(rng, plot)
    return _finish(rng, plot, slots, " ".join(tell(rng, plot, slots)))


def story(rng: random.Random) -> str:
    """Returns a story, now and then under a title."""
    made = make_story(rng)
    return f"{made.title}\n\n{made.text}" if rng.random() < 0.3 else made.text


def _passage(rng: random.Random) -> Story:
    return make_scene(rng) if rng.random() < 0.6 else make_story(rng, longest=115)


def comprehension(rng: random.Random) -> str:
    """Returns a passage and questions about it with their answers."""
    made = _passage(rng)
    chosen = rng.sample(made.questions, min(len(made.questions), rng.randint(1, 3)))
    asked = "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in chosen)
    return f"{made.text}\n\n{asked}"


def summary(rng: random.Random) -> str:
    """Returns a passage and one sentence that sums it up."""
    made = _passage(rng)
    return f"{made.text}\n\nSummary: {made.summary}"
