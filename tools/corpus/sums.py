"""Small sums with their results."""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.corpus import people
from tools.corpus.text import expand, number_word

_SIGNS = {"+": "plus", "-": "minus", "*": "times"}
_THINGS = people.LISTS["things"]
_CONTAINERS = {
    "box": "boxes",
    "bag": "bags",
    "basket": "baskets",
    "jar": "jars",
    "row": "rows",
    "plate": "plates",
    "shelf": "shelves",
    "packet": "packets",
}


def _operands(rng: random.Random) -> tuple[int, str, int]:
    """Returns a sum whose result is not negative; most are small, so that they can be learnt by heart."""
    sign = rng.choice("++--*")
    if sign == "*":
        return rng.randint(1, 10), sign, rng.randint(1, 10)
    largest = rng.choice((10, 20, 20, 50, 99))
    first, second = rng.randint(1, largest), rng.randint(0, min(largest, 20 if largest < 99 else 99))
    return (max(first, second), sign, min(first, second)) if sign == "-" else (first, sign, second)


def result(first: int, sign: str, second: int) -> int:
    """Returns what a sum comes to."""
    return {"+": first + second, "-": first - second, "*": first * second}[sign]


def _equations(rng: random.Random) -> str:
    sums = [_operands(rng) for _ in range(rng.randint(6, 14))]
    return "\n".join(f"{first} {sign} {second} = {result(first, sign, second)}" for first, sign, second in sums)


def _spoken(rng: random.Random) -> str:
    asked = []
    for _ in range(rng.randint(2, 4)):
        first, sign, second = _operands(rng)
        total = result(first, sign, second)
        question = rng.choice(("What is {0} {1} {2}?", "How much is {0} {1} {2}?")).format(first, _SIGNS[sign], second)
        answer = rng.choice(("{0} {3} {2} = {4}.", "{0} {1} {2} is {4}.", "The answer is {4}."))
        asked.append(f"Question: {question}\nAnswer: {answer.format(first, _SIGNS[sign], second, sign, total)}")
    return "\n\n".join(asked)


def _table(rng: random.Random) -> str:
    number, start = rng.randint(2, 10), rng.randint(1, 4)
    title = rng.choice((f"The {number} times table", f"Multiply by {number}", f"The table of {number}"))
    sums = [f"{factor} * {number} = {factor * number}" for factor in range(start, start + rng.randint(5, 8))]
    if rng.random() < 0.3:
        sums.reverse()
    return f"{title}:\n" + "\n".join(sums)


def _counting(rng: random.Random) -> str:
    step, start = rng.randint(1, 10), rng.randint(0, 30)
    numbers = [start + step * index for index in range(rng.randint(6, 9))]
    following = numbers[-1] + step
    if rng.random() < 0.3:
        numbers, following = [*reversed([*numbers, following])][:-1], start
    direction = "Count on" if numbers[0] <= numbers[-1] else "Count back"
    return (
        f"{direction} in steps of {step}: {', '.join(map(str, numbers))}.\n"
        f"Question: Which number comes next?\nAnswer: The next number is {following}."
    )


def _comparing(rng: random.Random) -> str:
    first, second = rng.sample(range(100), 2)
    larger, smaller = max(first, second), min(first, second)
    question, answer = rng.choice(
        (
            (f"Which number is larger, {first} or {second}?", f"{larger} is larger than {smaller}."),
            (f"Which number is smaller, {first} or {second}?", f"{smaller} is smaller than {larger}."),
            (f"How much larger is {larger} than {smaller}?", f"{larger} - {smaller} = {larger - smaller}."),
        )
    )
    return f"Question: {question}\nAnswer: {answer}"


def _step_by_step(rng: random.Random) -> str:
    tens, other_tens = rng.randint(1, 5), rng.randint(1, 4)
    ones, other_ones = rng.randint(1, 9), rng.randint(1, 9)
    first, second = 10 * tens + ones, 10 * other_tens + other_ones
    return (
        f"Question: What is {first} + {second}?\n"
        f"Answer: First add the tens: {10 * tens} + {10 * other_tens} = {10 * (tens + other_tens)}. "
        f"Then add the ones: {ones} + {other_ones} = {ones + other_ones}. "
        f"Together that makes {10 * (tens + other_tens)} + {ones + other_ones} = {first + second}."
    )


def _count(number: int, thing: str, words: bool = False) -> str:
    return f"{number_word(number) if words else number} {thing}{'' if number == 1 else 's'}"


def _word_problem(rng: random.Random) -> str:
    (name, pronouns), (friend, _) = people.names(rng, 2)
    thing = rng.choice(_THINGS)
    slots = {"name": name, "friend": friend, "things": f"{thing}s", **pronouns.slots()}
    sort = rng.choice(("more", "fewer", "times", "left", "difference"))
    words = rng.random() < 0.3
    first, second = rng.randint(2, 20), rng.randint(1, 15)
    if sort == "times":
        container, containers = rng.choice(list(_CONTAINERS.items()))
        first, second = rng.randint(2, 10), rng.randint(2, 10)
        slots |= {"a": number_word(first) if words else str(first), "container": container, "containers": containers}
        slots |= {"b": _count(second, thing, words), "total": _count(first * second, thing)}
        slots["inside"] = "on" if container in ("plate", "shelf") else "in"
        problem = (
            "{name} has {a} {containers}. There are {b} {inside} each {container}. "
            "How many {things} [are there|does {name} have] [altogether|in all]?"
        )
        answer = f"{first} * {second} = {first * second}. There are {{total}} [altogether|in all]."
    elif sort == "more":
        slots |= {"a": _count(first, thing, words), "b": number_word(second) if words else str(second)}
        slots["total"] = _count(first + second, thing)
        problem = (
            "[{name} has {a}. {friend} gives {him} {b} more.|"
            "{name} finds {a} in the morning and {b} more in the evening.|"
            "There are {a} on the table. {name} puts {b} more beside them.] "
            "How many {things} [are there now|are there altogether]?"
        )
        answer = f"{first} + {second} = {first + second}. [There are {{total}}|That makes {{total}}]."
    elif sort == "difference":
        first, second = max(first, second) + 1, min(first, second)
        slots |= {"a": _count(first, thing, words), "b": _count(second, thing, words), "total": str(first - second)}
        slots["more"] = _count(first - second, f"more {thing}")
        problem = "{name} has {a}, and {friend} has {b}. How many more {things} does {name} have than {friend}?"
        answer = f"{first} - {second} = {first - second}. {{name}} has {{more}}."
    else:
        first, second = max(first, second) + 1, min(first, second)
        slots |= {"a": _count(first, thing, words), "b": number_word(second) if words else str(second)}
        slots["total"] = _count(first - second, thing)
        slots["are"] = "is" if first - second == 1 else "are"
        problem = (
            "[{name} has {a} and gives {b} of them to {friend}.|"
            "There are {a} in the box. {name} takes {b} of them away.|"
            "{name} buys {a}, but {he} loses {b} on the way home.] How many {things} are left?"
        )
        answer = f"{first} - {second} = {first - second}. There {{are}} {{total}} left."
    asked = expand(problem, rng, slots)
    reply = expand(answer, rng, slots)
    return rng.choice((f"Question: {asked}\nAnswer: {reply}", f"{asked}\n\nAnswer: {reply}"))


def _several(make: Callable[[random.Random], str], count: int) -> Callable[[random.Random], str]:
    return lambda rng: "\n\n".join(make(rng) for _ in range(count))


_MAKERS: tuple[tuple[int, Callable[[random.Random], str]], ...] = (
    (4, _equations),
    (3, _spoken),
    (1, _table),
    (1, _several(_counting, 2)),
    (1, _several(_comparing, 3)),
    (2, _several(_step_by_step, 2)),
    (4, _several(_word_problem, 2)),
)


def arithmetic(rng: random.Random) -> str:
    """Returns a text of sums."""
    return rng.choices([make for _, make in _MAKERS], [weight for weight, _ in _MAKERS])[0](rng)
