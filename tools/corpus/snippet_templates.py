"""The templates of the code snippets: what each function does, its code, its examples and the values of its marks.

The marks are those of `string.Template`: ``$name`` is one of the values of `name`, the same everywhere in one snippet;
``$doc`` is the docstring.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.corpus.people import BOYS, GIRLS, LISTS

_WORDS = LISTS["code_words"]
_SENTENCES = (
    "the cat sat on the mat",
    "a big red bus",
    "we like warm bread",
    "birds sing in the tree",
    "the sun is bright today",
    "my dog can swim",
    "one small step at a time",
    "rain falls on the roof",
    "the moon is round",
    "she reads a good book",
)

Value = Callable[[random.Random], str]


def _number(low: int, high: int) -> Value:
    return lambda rng: str(rng.randint(low, high))


def _numbers(low: int, high: int, shortest: int = 3, longest: int = 6) -> Value:
    return lambda rng: str([rng.randint(low, high) for _ in range(rng.randint(shortest, longest))])


def _word(rng: random.Random) -> str:
    return f'"{rng.choice(_WORDS)}"'


def _words(rng: random.Random) -> str:
    return "[" + ", ".join(f'"{word}"' for word in rng.sample(_WORDS, rng.randint(3, 4))) + "]"


def _sentence(rng: random.Random) -> str:
    return f'"{rng.choice(_SENTENCES)}"'


def _name(rng: random.Random) -> str:
    return f'"{rng.choice(GIRLS + BOYS)}"'


def _either(*values: str) -> Value:
    return lambda rng: rng.choice(values)


@dataclass(frozen=True)
class Snippet:
    """A template: what it does in one sentence, its code, its examples and the values of its marks."""

    does: str
    code: str
    examples: tuple[str, ...]
    values: dict[str, Value]


_LIST = _either("numbers", "values", "items")
_X = _either("x", "n", "number", "value")
SNIPPETS: tuple[Snippet, ...] = (
    Snippet(
        "Return $x $verb $k.",
        "def ${op}_$k($x):\n    $doc\n    return $x $sign $k\n",
        ("${op}_$k($a)", "${op}_$k($b)"),
        {
            "x": _X,
            "triple": _either("plus + add", "minus - subtract", "times * multiply_by"),
            "k": _number(2, 12),
            "a": _number(1, 20),
            "b": _number(21, 60),
        },
    ),
    Snippet(
        "Return the sum of two numbers.",
        "def $f($x, $y):\n    $doc\n    return $x + $y\n",
        ("$f($a, $b)",),
        {
            "f": _either("add", "sum_of_two", "plus"),
            "x": _either("a", "first", "left"),
            "y": _either("b", "second", "right"),
            "a": _number(1, 50),
            "b": _number(1, 50),
        },
    ),
    Snippet(
        "Return the larger of two numbers.",
        "def $f(a, b):\n    $doc\n    if a > b:\n        return a\n    return b\n",
        ("$f($a, $b)",),
        {"f": _either("larger", "maximum", "larger_of"), "a": _number(1, 50), "b": _number(1, 50)},
    ),
    Snippet(
        "Return the smallest number in a list.",
        "def $f($list):\n    $doc\n    $best = $list[0]\n    for number in $list:\n        if number < $best:\n"
        "            $best = number\n    return $best\n",
        ("$f($a)",),
        {
            "f": _either("smallest", "minimum", "find_smallest"),
            "list": _either("numbers", "values"),
            "best": _either("best", "smallest_so_far", "result"),
            "a": _numbers(1, 40),
        },
    ),
    Snippet(
        "Return the sum of all numbers in a list.",
        "def $f($list):\n    $doc\n    total = 0\n    for $x in $list:\n        total += $x\n    return total\n",
        ("$f($a)",),
        {
            "f": _either("total", "sum_list", "add_all"),
            "list": _LIST,
            "x": _either("x", "number"),
            "a": _numbers(1, 20),
        },
    ),
    Snippet(
        "Return the average of a list of numbers.",
        "def $f($list):\n    $doc\n    return sum($list) / len($list)\n",
        ("$f($a)",),
        {
            "f": _either("average", "mean"),
            "list": _LIST,
            "a": lambda rng: str([2 * rng.randint(1, 20) for _ in range(rng.choice((2, 4)))]),
        },
    ),
    Snippet(
        "Return True if a number is $parity.",
        "def is_$parity($x):\n    $doc\n    return $x % 2 == $rest\n",
        ("is_$parity($a)", "is_$parity($b)"),
        {"x": _X, "pair": _either("even 0", "odd 1"), "a": _number(1, 50), "b": _number(1, 50)},
    ),
    Snippet(
        "Return the numbers of a list that are $parity.",
        "def $f($list):\n    $doc\n    return [$x for $x in $list if $x % 2 == $rest]\n",
        ("$f($a)",),
        {
            "f": _either("keep", "select", "filter_numbers"),
            "list": _LIST,
            "x": _either("x", "number"),
            "pair": _either("even 0", "odd 1"),
            "a": _numbers(1, 30, 4, 7),
        },
    ),
    Snippet(
        "Return a list with every number $verb $k.",
        "def ${op}_each($list):\n    $doc\n    return [$x $sign $k for $x in $list]\n",
        ("${op}_each($a)",),
        {
            "list": _LIST,
            "x": _either("x", "number"),
            "triple": _either("plus + add_to", "minus - take_from", "times * multiply"),
            "k": _number(2, 9),
            "a": _numbers(1, 20),
        },
    ),
    Snippet(
        "Return the squares of the numbers from 1 to $x.",
        "def $f($x):\n    $doc\n    result = []\n    for i in range(1, $x + 1):\n        result.append(i * i)\n"
        "    return result\n",
        ("$f($a)",),
        {"f": _either("squares", "square_numbers"), "x": _either("n", "last", "limit"), "a": _number(2, 8)},
    ),
    Snippet(
        "Return the factorial of $x.",
        "def $f($x):\n    $doc\n    if $x <= 1:\n        return 1\n    return $x * $f($x - 1)\n",
        ("$f($a)",),
        {"f": _either("factorial", "fact"), "x": _either("n", "number"), "a": _number(1, 7)},
    ),
    Snippet(
        "Return the Fibonacci number at place $x.",
        "def $f($x):\n    $doc\n    a, b = 0, 1\n    for _ in range($x):\n        a, b = b, a + b\n    return a\n",
        ("$f($a)", "$f($b)"),
        {"f": _either("fibonacci", "fib"), "x": _either("n", "k"), "a": _number(1, 8), "b": _number(9, 15)},
    ),
    Snippet(
        "Return True if $x is a prime number.",
        "def is_prime($x):\n    $doc\n    if $x < 2:\n        return False\n    for $d in range(2, $x):\n"
        "        if $x % $d == 0:\n            return False\n    return True\n",
        ("is_prime($a)", "is_prime($b)"),
        {"x": _either("n", "number"), "d": _either("i", "divisor", "d"), "a": _number(2, 30), "b": _number(31, 60)},
    ),
    Snippet(
        "Return the greatest common divisor of a and b.",
        "def $f(a, b):\n    $doc\n    while b:\n        a, b = b, a % b\n    return a\n",
        ("$f($a, $b)",),
        {"f": _either("gcd", "greatest_common_divisor"), "a": _number(6, 60), "b": _number(6, 60)},
    ),
    Snippet(
        "Return the sum of the digits of a number.",
        "def $f($x):\n    $doc\n    return sum(int(digit) for digit in str($x))\n",
        ("$f($a)",),
        {"f": _either("digit_sum", "sum_of_digits"), "x": _X, "a": _number(10, 9999)},
    ),
    Snippet(
        "Count down from $x to 1.",
        "def $f($x):\n    $doc\n    result = []\n    while $x > 0:\n        result.append($x)\n        $x -= 1\n"
        "    return result\n",
        ("$f($a)",),
        {"f": _either("countdown", "count_down"), "x": _either("start", "n"), "a": _number(3, 9)},
    ),
    Snippet(
        "Return $base to the power of $x.",
        "def $f($base, $x):\n    $doc\n    result = 1\n    for _ in range($x):\n"
        "        result *= $base\n    return result\n",
        ("$f($a, $b)",),
        {
            "f": _either("power", "raise_to"),
            "base": _either("base", "a"),
            "x": _either("exponent", "n"),
            "a": _number(2, 5),
            "b": _number(1, 5),
        },
    ),
    Snippet(
        "Return the text backwards.",
        "def $f($s):\n    $doc\n    return $s[::-1]\n",
        ("$f($a)",),
        {"f": _either("reverse", "backwards", "flip"), "s": _either("text", "word", "s"), "a": _word},
    ),
    Snippet(
        "Return True if a word reads the same backwards.",
        "def is_palindrome($s):\n    $doc\n    $s = $s.lower()\n    return $s == $s[::-1]\n",
        ("is_palindrome($a)", 'is_palindrome("$b")'),
        {"s": _either("word", "text"), "a": _word, "b": _either("level", "radar", "Anna", "noon", "civic")},
    ),
    Snippet(
        "Count how often the letter $letter occurs in a text.",
        'def $f($s):\n    $doc\n    count = 0\n    for letter in $s:\n        if letter == "$letter":\n'
        "            count += 1\n    return count\n",
        ("$f($a)",),
        {
            "f": _either("count_letter", "how_many"),
            "s": _either("text", "word"),
            "letter": _either(*"aeiorstn"),
            "a": _sentence,
        },
    ),
    Snippet(
        "Count the vowels in a text.",
        'def $f($s):\n    $doc\n    return sum(1 for letter in $s if letter in "aeiou")\n',
        ("$f($a)",),
        {"f": _either("count_vowels", "vowels"), "s": _either("text", "word", "s"), "a": _sentence},
    ),
    Snippet(
        "Return the number of words in a text.",
        "def $f($s):\n    $doc\n    return len($s.split())\n",
        ("$f($a)",),
        {"f": _either("count_words", "word_count"), "s": _either("text", "sentence", "line"), "a": _sentence},
    ),
    Snippet(
        "Return the longest word in a list.",
        'def $f(words):\n    $doc\n    $best = ""\n    for word in words:\n        if len(word) > len($best):\n'
        "            $best = word\n    return $best\n",
        ("$f($a)",),
        {"f": _either("longest", "longest_word"), "best": _either("best", "result"), "a": _words},
    ),
    Snippet(
        "Return the words of a list in $case letters.",
        "def $f(words):\n    $doc\n    return [word.$method() for word in words]\n",
        ("$f($a)",),
        {"f": _either("change_case", "convert_words"), "pair": _either("capital upper", "small lower"), "a": _words},
    ),
    Snippet(
        "Join the words of a list with $mark between them.",
        'def $f(words):\n    $doc\n    return "$sep".join(words)\n',
        ("$f($a)",),
        {
            "f": _either("join_words", "connect"),
            "pair": _either("dashes -", "commas ,", "dots .", "stars *"),
            "a": _words,
        },
    ),
    Snippet(
        "Return the first and the last letter of a word.",
        "def $f($s):\n    $doc\n    return $s[0] + $s[-1]\n",
        ("$f($a)",),
        {"f": _either("ends", "first_and_last"), "s": _either("word", "text"), "a": _word},
    ),
    Snippet(
        "Return a greeting for a person.",
        'def greet($x):\n    $doc\n    return f"$hello, {$x}!"\n',
        ("greet($a)", "greet($b)"),
        {
            "x": _either("name", "person", "friend"),
            "hello": _either("Hello", "Good morning", "Welcome", "Good evening", "Hi", "Nice to meet you"),
            "a": _name,
            "b": _name,
        },
    ),
    Snippet(
        "Count how often each item occurs.",
        "def $f(items):\n    $doc\n    counts = {}\n    for item in items:\n"
        "        counts[item] = counts.get(item, 0) + 1\n    return counts\n",
        ("$f($a)",),
        {"f": _either("count_items", "tally", "frequencies"), "a": _numbers(1, 3, 4, 6)},
    ),
    Snippet(
        "Return a dictionary of words and their lengths.",
        "def $f(words):\n    $doc\n    return {word: len(word) for word in words}\n",
        ("$f($a)",),
        {"f": _either("lengths", "word_lengths"), "a": _words},
    ),
    Snippet(
        "Return the items of a list without doubles, in order.",
        "def $f(items):\n    $doc\n    result = []\n    for item in items:\n        if item not in result:\n"
        "            result.append(item)\n    return result\n",
        ("$f($a)",),
        {"f": _either("unique", "without_doubles"), "a": _numbers(1, 4, 4, 7)},
    ),
    Snippet(
        "Sort a list with bubble sort.",
        "def bubble_sort($list):\n    $doc\n    $list = list($list)\n    for end in range(len($list) - 1, 0, -1):\n"
        "        for i in range(end):\n            if $list[i] > $list[i + 1]:\n"
        "                $list[i], $list[i + 1] = $list[i + 1], $list[i]\n    return $list\n",
        ("bubble_sort($a)",),
        {"list": _LIST, "a": _numbers(1, 30)},
    ),
    Snippet(
        "Return the place of an item in a list, or -1.",
        "def $f(items, wanted):\n    $doc\n    for index, item in enumerate(items):\n        if item == wanted:\n"
        "            return index\n    return -1\n",
        ("$f($a, $b)",),
        {"f": _either("find", "search", "index_of"), "a": _numbers(1, 9, 4, 6), "b": _number(1, 9)},
    ),
    Snippet(
        "Return the numbers from 1 to $x with Fizz and Buzz.",
        "def fizz_buzz($x):\n    $doc\n    result = []\n    for i in range(1, $x + 1):\n"
        '        if i % $k == 0:\n            result.append("Fizz")\n        elif i % $m == 0:\n'
        '            result.append("Buzz")\n        else:\n            result.append(str(i))\n'
        '    return " ".join(result)\n',
        ("fizz_buzz($a)",),
        {"x": _either("n", "limit"), "k": _either("3", "2"), "m": _either("5", "7"), "a": _number(5, 12)},
    ),
    Snippet(
        "Convert $from_unit to $to_unit.",
        "def to_$to_unit($from_unit):\n    $doc\n    return $from_unit * $k\n",
        ("to_$to_unit($a)",),
        {
            "triple": _either(
                "hours minutes 60",
                "minutes seconds 60",
                "days hours 24",
                "weeks days 7",
                "years months 12",
                "metres centimetres 100",
                "kilometres metres 1000",
                "kilograms grams 1000",
            ),
            "a": _number(1, 20),
        },
    ),
    Snippet(
        "Return the area of a rectangle.",
        "def $f($x, $y):\n    $doc\n    return $x * $y\n",
        ("$f($a, $b)",),
        {
            "f": _either("area", "rectangle_area"),
            "x": _either("width", "w"),
            "y": _either("height", "h"),
            "a": _number(2, 20),
            "b": _number(2, 20),
        },
    ),
    Snippet(
        "Return $high if the number is over $k, or else $low.",
        'def $f($x):\n    $doc\n    if $x > $k:\n        return "$high"\n    return "$low"\n',
        ("$f($a)", "$f($b)"),
        {
            "f": _either("describe", "size", "label"),
            "x": _X,
            "pair": _either("big small", "high low", "warm cold", "long short"),
            "k": _number(5, 20),
            "a": _number(1, 10),
            "b": _number(11, 30),
        },
    ),
    Snippet(
        "A $thing that can be counted up.",
        "class $Class:\n    $doc\n\n    def __init__(self):\n        self.$field = $k\n\n"
        "    def $method(self):\n        self.$field += $m\n        return self.$field\n\n\n$var = $Class()\n",
        ("$var.$method()", "$var.$method()"),
        {
            "triple": _either("counter Counter c", "clock Clock clock", "score Score score", "meter Meter meter"),
            "field": _either("count", "value", "total"),
            "method": _either("step", "increase", "advance"),
            "k": _number(0, 5),
            "m": _number(1, 5),
        },
    ),
    Snippet(
        "A bank account with a balance.",
        "class Account:\n    $doc\n\n    def __init__(self, $owner):\n        self.$owner = $owner\n"
        "        self.balance = 0\n\n    def $method(self, amount):\n        self.balance += amount\n\n\n"
        "account = Account($name)\naccount.$method($a)\naccount.$method($b)\n",
        ("account.balance",),
        {
            "owner": _either("owner", "name"),
            "method": _either("deposit", "add", "pay_in"),
            "name": _name,
            "a": _number(5, 100),
            "b": _number(5, 100),
        },
    ),
    Snippet(
        "A $kind with a name and a sound.",
        "class $Kind:\n    $doc\n\n    def __init__(self, name):\n        self.name = name\n\n    def speak(self):\n"
        '        return f"{self.name} says $sound!"\n\n\n$var = $Kind($name)\n',
        ("$var.speak()",),
        {
            "quad": _either(
                "dog Dog woof dog",
                "cat Cat meow cat",
                "cow Cow moo cow",
                "duck Duck quack duck",
                "sheep Sheep baa sheep",
                "bee Bee buzz bee",
                "owl Owl hoo owl",
                "mouse Mouse squeak mouse",
            ),
            "name": _name,
        },
    ),
    Snippet(
        "A stack of items: the last one in is the first one out.",
        "class Stack:\n    $doc\n\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
        "        self.items.append(item)\n\n    def pop(self):\n        return self.items.pop()\n\n\n"
        "stack = Stack()\nstack.push($a)\nstack.push($b)\n",
        ("stack.pop()", "stack.pop()"),
        {"a": _word, "b": _word},
    ),
)
# Marks that are set together: the words of one value go to these marks in turn. The first set whose marks a snippet
# uses is taken.
TOGETHER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("triple", ("verb", "sign", "op")),
    ("pair", ("parity", "rest")),
    ("pair", ("case", "method")),
    ("pair", ("mark", "sep")),
    ("pair", ("high", "low")),
    ("triple", ("from_unit", "to_unit", "k")),
    ("triple", ("thing", "Class", "var")),
    ("quad", ("kind", "Kind", "sound", "var")),
)
