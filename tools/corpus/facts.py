"""Paragraphs of true facts, and questions about them, from the tables in `data/facts.txt`."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache

from tools.corpus.people import DATA
from tools.corpus.text import capitalize, expand, join, template_slots, title_case, word_count

# A paragraph of fewer words is followed by one about another subject.
SHORTEST = 45
# The slots that name what a row is about, in the order in which they are looked for.
_SUBJECTS = ("plural", "the", "name", "whole")
_GROUP_FRAMES = {
    "animal": ("{^members} are {key}.", "{^members} are all {key}."),
    "country": ("{^members} are countries in {key}.", "In {key} there are countries such as {members}."),
}
# Of these one reads several in a row, as one paragraph.
_SHORT_TOPICS = ("measure", "opposite", "month", "day")


@dataclass
class Topic:
    """The rows of one sort, with what is said and asked about each. Alternatives are parted by " | "."""

    name: str
    statements: list[str] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)


@cache
def load() -> list[Topic]:
    """Returns the topics.

    Raises:
        ValueError: A line of the file is none of those that it may hold.
    """
    topics: list[Topic] = []
    for number, line in enumerate((DATA / "facts.txt").read_text(encoding="utf-8").splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word == "==":
            topics.append(Topic(rest))
        elif word == "say":
            topics[-1].statements.append(rest)
        elif word == "ask":
            question, _, answer = rest.partition(" => ")
            topics[-1].questions.append((question, answer))
        elif word == "*":
            cells = (cell.partition("=") for cell in rest.split("; "))
            row = {key: value for key, _, value in cells}
            if "group" in row:
                row["groups"] = "fish" if row["group"] == "fish" else f"{row['group']}s"
            topics[-1].rows.append(row)
        else:
            raise ValueError(f"data/facts.txt, line {number}: {line!r} is not understood.")
    return topics


def _one_of(rng: random.Random, alternatives: str, row: dict[str, str]) -> str:
    """Expands one of the alternatives whose slots the row has; the empty string if there is none."""
    possible = [template for template in alternatives.split(" | ") if template_slots(template) <= row.keys()]
    return expand(rng.choice(possible), rng, row) if possible else ""


def _pick(rng: random.Random) -> tuple[Topic, dict[str, str]]:
    """Returns a row, each row of the whole file being as likely as any other."""
    topics = load()
    topic = rng.choices(topics, [len(topic.rows) for topic in topics])[0]
    return topic, rng.choice(topic.rows)


def _about(rng: random.Random, topic: Topic, row: dict[str, str]) -> str:
    statements = [said for template in topic.statements if (said := _one_of(rng, template, row))]
    # The first one names the subject; the others may call it "it" or "they".
    rest = statements[1:]
    if rng.random() < 0.5:
        rng.shuffle(rest)
    if len(rest) > 2 and rng.random() < 0.3:
        rest.pop()
    return " ".join([statements[0], *rest])


def _group(rng: random.Random, topic: Topic, row: dict[str, str]) -> str:
    """Returns a sentence that names an animal's or a country's fellows; the empty string if it has too few."""
    key, subject = ("groups", "plural") if topic.name == "animal" else ("continent", "the")
    others = [other[subject] for other in topic.rows if other[key] == row[key] and other is not row]
    if len(others) < 3:
        return ""
    members = [row[subject], *rng.sample(others, rng.randint(2, 3))]
    rng.shuffle(members)
    frame = rng.choice(_GROUP_FRAMES[topic.name])
    return expand(frame, rng, {"members": join(members), "key": row[key]})


def paragraph(rng: random.Random) -> str:
    """Returns a short text of facts about one subject, or about a few of the same sort."""
    topic, row = _pick(rng)
    subject = next((row[key] for key in _SUBJECTS if key in row), topic.name)
    parts = [_about(rng, topic, row)]
    if topic.name in _GROUP_FRAMES and rng.random() < 0.3 and (group := _group(rng, topic, row)):
        parts[0] = f"{group} {parts[0]}"
    others = [other for other in topic.rows if other is not row]
    rng.shuffle(others)
    while word_count(" ".join(parts)) < SHORTEST:
        parts.append(_about(rng, topic, others.pop()))
    text = (" " if topic.name in _SHORT_TOPICS else "\n\n").join(parts)
    if len(parts) == 1 and rng.random() < 0.4:
        return f"{title_case(subject)}\n\n{text}"
    return text


def question(rng: random.Random) -> tuple[str, str]:
    """Returns a question and its answer."""
    topic, row = _pick(rng)
    while True:
        asked, answer = rng.choice(topic.questions)
        if (made := _one_of(rng, asked, row)) and (reply := _one_of(rng, answer, row)):
            return made, capitalize(reply)


def quiz(rng: random.Random) -> str:
    """Returns one to five questions with their answers."""
    asked: dict[str, str] = {}
    for _ in range(rng.choice((1, 2, 3, 4, 5))):
        asked.setdefault(*question(rng))
    return "\n\n".join(f"Question: {made}\nAnswer: {answer}" for made, answer in asked.items())
