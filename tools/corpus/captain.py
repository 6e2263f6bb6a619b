"""The sample for fine-tuning: simple questions that a cheerful ship's captain answers in a style of his own."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tools.corpus import facts
from tools.corpus.people import DATA
from tools.corpus.text import expand, word_count

FEWEST_WORDS, MOST_WORDS = 8, 25
# By topic of facts.txt: what is asked, and the heart of the answer.
_FACTS = {
    "animal": (
        ("What do {plural} eat?", "{plural} eat {food}"),
        ("Where do {plural} live?", "{plural} live in {home}"),
        ("What is a young {name} called?", "a young {name} is called a(n) {young}"),
    ),
    "country": (
        ("What is the capital of {the}?", "the capital of {the} is {capital}"),
        ("Where is {the}?", "{the} is in {continent}"),
    ),
    "planet": (("Which planet is the {order} from the Sun?", "the {order} planet from the Sun is {name}"),),
    "job": (("What does a(n) {name} do?", "a(n) {name} has to {does}"),),
    "tool": (("What is a(n) {name} used for?", "a(n) {name} is used to {use}"),),
    "made_from": (("What is {name} made from?", "{name} is made from {from}"),),
    "season": (("Which season comes after {before}?", "after {before} comes {name}"),),
    "month": (("Which month comes after {before}?", "after {before} comes {name}"),),
    "day": (("Which day comes after {before}?", "after {before} comes {name}"),),
    "colour": (("What colour {is_a} {a}?", "{a} {is_a} {name}"),),
    "body": (("What do we use {name} for?", "we use {name} to {use}"),),
    "measure": (("How many {parts} are there in {whole}?", "there are {count} {parts} in {whole}"),),
    "opposite": (("What is the opposite of {a}?", "the opposite of {a} is {b}"),),
}
# Questions about the captain and about everyday life, among those about facts.
_EVERYDAY_SHARE = 0.25


def _load() -> tuple[list[str], list[tuple[str, str]]]:
    frames, everyday = [], []
    for line in (DATA / "captain.txt").read_text(encoding="utf-8").splitlines():
        word, _, rest = line.partition(" ")
        if word == "frame":
            frames.append(rest)
        elif word == "ask":
            question, _, core = rest.partition(" => ")
            everyday.append((question, core))
    return frames, everyday


def _asked(rng: random.Random) -> tuple[str, str]:
    topics = [topic for topic in facts.load() if topic.name in _FACTS]
    while True:
        # The square root evens the topics out: there are ten times as many animals as seasons.
        topic = rng.choices(topics, [len(topic.rows) ** 0.5 for topic in topics])[0]
        row = rng.choice(topic.rows)
        question, core = rng.choice(_FACTS[topic.name])
        try:
            return expand(question, rng, row), expand(core, rng, row, phrase=True)
        except KeyError:
            # The row lacks a slot of the question.
            continue


def style_sample(seed: int, count: int = 120) -> Iterator[dict[str, str]]:
    """Yields `count` different questions as `prompt`, each with the captain's answer as `response`.

    Raises:
        ValueError: `count` is negative, or more than there are questions enough for.
    """
    if not 0 <= count <= 300:
        raise ValueError(f"The style sample can have 0 to 300 lines, not {count}.")
    rng = random.Random(f"captain/{seed}")
    frames, everyday = _load()
    rng.shuffle(everyday)
    asked: set[str] = set()
    while len(asked) < count:
        question, core = everyday.pop() if everyday and rng.random() < _EVERYDAY_SHARE else _asked(rng)
        answer = expand(rng.choice(frames), rng, {"core": core})
        if question not in asked and FEWEST_WORDS <= word_count(answer) <= MOST_WORDS:
            asked.add(question)
            yield {"prompt": f"Question: {question}\nAnswer:", "response": f" {answer}"}
