"""Tests of `tools/corpus`: is what it writes right, and is it the same each time?"""

from __future__ import annotations

import ast
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools import corpus
from tools.corpus import facts, snippets, stories, sums, text
from tools.corpus.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[2]
COUNT = 4000


@pytest.fixture(scope="module")
def sample() -> list:
    return list(corpus.documents(0, COUNT))


@pytest.fixture(scope="module")
def prose(sample: list) -> list[str]:
    return [document.text for document in sample if document.kind not in ("code", "sum")]


def _words(texts: list[str]) -> Counter[str]:
    return Counter(word for text in texts for word in re.findall(r"[a-z]+(?:['-][a-z]+)*", text.lower()))


def test_same_seed_same_documents(sample: list) -> None:
    assert list(corpus.documents(0, 300)) == sample[:300]


def test_documents_do_not_depend_on_the_hash_seed() -> None:
    code = "from tools.corpus import documents; print(list(documents(3, 60)))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_different_seeds_differ(sample: list) -> None:
    texts = {document.text for document in sample}
    others = [document.text for document in corpus.documents(1, 300)]
    assert sum(text in texts for text in others) < 30


def test_no_two_documents_are_the_same(sample: list) -> None:
    assert len({document.text for document in sample}) == len(sample)


def test_kinds_and_lengths(sample: list) -> None:
    kinds = Counter(document.kind for document in sample)
    assert set(kinds) == set(corpus.KINDS)
    assert 0.40 < kinds["story"] / len(sample) < 0.50
    lengths = [len(document.text.split()) for document in sample]
    assert 60 <= sum(lengths) / len(lengths) <= 130
    assert max(lengths) < 200
    told = [len(document.text.split()) for document in sample if document.kind == "story"]
    assert min(told) >= 60


def test_the_vocabulary_is_large(sample: list, prose: list[str]) -> None:
    assert len(_words(prose)) >= 2500


def test_every_template_can_be_filled() -> None:
    for file in ("stories.txt", "scenes.txt", "dialogues.txt"):
        for plot in stories.load(file)[1]:
            for attempt in range(8):
                rng = random.Random(attempt)
                slots = stories.cast(rng, plot)
                templates = [template for beat in plot.beats for template in beat.alternatives]
                templates += plot.titles + plot.summaries + [part for asked in plot.questions for part in asked]
                for template in templates:
                    text.expand(template, rng, slots)
    for topic in facts.load():
        for row in topic.rows:
            statements = [facts._one_of(random.Random(0), template, row) for template in topic.statements]
            assert statements[0]
            assert sum(map(bool, statements)) >= 1


def test_there_are_many_plots() -> None:
    plots = stories.load()[1]
    assert len({plot.name for plot in plots}) == len(plots) >= 30
    # A pattern is a plot with one row of each of its tables: the sentences around them vary as well.
    patterns = 0
    for plot in plots:
        combinations = 1
        for table in plot.tables:
            combinations *= len(table)
        patterns += combinations
    assert patterns >= 60


@pytest.mark.parametrize(
    "mistake",
    [
        # "an" before a consonant, "a" before a vowel.
        r"\b[Aa]n (?!hour|honest|heir)[^aeiouAEIOU\W\d]\w*",
        r"\b[Aa] (?!uni|us[eu]|one\b|once|eu)[aeiouAEIOU]\w+",
        # Doubled spaces and words, spaces before punctuation, doubled punctuation, marks that were not resolved.
        r"(?<=\S)  +|[ \t]\n|[ \t]$",
        r"\b(\w+) \1\b",
        r" [,.;:!?]",
        r"[.,;:][.,;:]|[!?][.,]",
        r"[{}|]|\[|\]|\$|a\(n\)",
        # A sentence without its capital letter.
        r"[.!?] [a-z]",
        r"^[a-z]|\n[a-z]",
    ],
)
def test_grammar(prose: list[str], mistake: str) -> None:
    pattern = re.compile(mistake)
    found = [text[max(match.start() - 20, 0) : match.end() + 20] for text in prose for match in pattern.finditer(text)]
    assert found == []


def test_quotes_are_paired(prose: list[str]) -> None:
    assert [text for text in prose if any(part.count('"') % 2 for part in text.split("\n"))] == []


def test_number_agrees_in_sums(sample: list) -> None:
    # "1 apples", "one apples" or "5 apple".
    wrong = re.compile(
        r"(?<!-)\b(?:1|one) (?!plus|minus|times|is)[a-z]+s\b|\b(?:[02-9]|\d\d) (?!more)[a-z]+(?<!s) left\b"
    )
    problems = [document.text for document in sample if document.kind == "sum"]
    assert not [match[0] for problem in problems for match in wrong.finditer(problem)]


def _holds(equation: tuple[str, str, str, str]) -> bool:
    first, sign, second, total = equation
    return sums.result(int(first), sign, int(second)) == int(total)


def test_sums_are_right(sample: list) -> None:
    texts = [document.text for document in sample if document.kind == "sum"]
    written = [match for text in texts for match in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", text)]
    assert len(written) > 500
    assert all(map(_holds, written))
    signs = {"plus": "+", "minus": "-", "times": "*"}
    asked = [
        (first, signs[sign], second, numbers[-1])
        for text in texts
        for first, sign, second, answer in re.findall(r"(\d+) (plus|minus|times) (\d+)\?\nAnswer: ([^\n]*)", text)
        if (numbers := re.findall(r"\d+", answer))
    ]
    assert len(asked) > 50
    assert all(map(_holds, asked))
    # Each sum has one result, whatever follows it: "12 biscuits", not another number.
    for written_out in texts:
        for total, rest in re.findall(r"= (\d+)\. ([^\n]*)", written_out):
            assert "Then add the ones" in written_out or all(number == total for number in re.findall(r"\d+", rest))


def test_code_compiles_and_its_examples_hold(sample: list) -> None:
    code = [document.text for document in sample if document.kind == "code"]
    assert len(code) > 100
    for source in code:
        tree = ast.parse(source)
        defined = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert defined
        assert all(map(ast.get_docstring, defined))
        stated = re.findall(r"^print\(.*\)  # (.*)$", source, flags=re.MULTILINE)
        assert stated
        assert snippets.run(source) == stated
    assert len({ast.get_docstring(ast.parse(source).body[0]) for source in code}) > 60


def test_questions_have_answers(sample: list) -> None:
    for document in sample:
        if document.kind == "question":
            assert document.text.count("Question: ") == document.text.count("\nAnswer: ") >= 1
            assert re.search(r"Question: [^\n]+[?.]\nAnswer: [A-Z0-9][^\n]+[.!?\"]$", document.text)
        if document.kind == "summary":
            assert re.search(r"\n\nSummary: [A-Z][^\n]+[.!?\"]$", document.text)


def test_capitals_are_asked_about_correctly(sample: list) -> None:
    right = {row["the"]: row["capital"] for topic in facts.load() if topic.name == "country" for row in topic.rows}
    assert right["France"] == "Paris"
    assert len(right) >= 50
    asked = [
        match
        for document in sample
        for match in re.findall(r"What is the capital of (.+?)\?\nAnswer: ([^\n]+)", document.text)
    ]
    assert asked
    assert all(right[country] in answer for country, answer in asked)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("apple", "an"),
        ("hour", "an"),
        ("honest", "an"),
        ("umbrella", "an"),
        ("uninvited", "an"),
        ("onion", "an"),
        ("omelette", "an"),
        ("8", "an"),
        ("unicorn", "a"),
        ("useful", "a"),
        ("one", "a"),
        ("European", "a"),
        ("house", "a"),
        ("7", "a"),
    ],
)
def test_article(word: str, expected: str) -> None:
    assert text.article(word) == expected


@pytest.mark.parametrize(("number", "expected"), [(0, "zero"), (12, "twelve"), (20, "twenty"), (47, "forty-seven")])
def test_number_word(number: int, expected: str) -> None:
    assert text.number_word(number) == expected


def test_templates() -> None:
    rng = random.Random(0)
    assert text.expand("[one|one] a(n) {x} [|]here.", rng, {"x": "old owl"}) == "One an old owl here."
    assert text.expand('he said, "{x}".', rng, {"x": "Yes"}) == 'He said, "Yes."'
    assert text.expand("{^x}", rng, {"x": "the end"}, phrase=True) == "The end"
    drawn = {text.expand("[a|[b|c]]", random.Random(seed), {}) for seed in range(30)}
    assert drawn == {"A", "B", "C"}
    with pytest.raises(KeyError):
        text.expand("{y}", rng, {})
    for unbalanced in ("[a", "a]", "a|b", "[a|[b]"):
        with pytest.raises(ValueError, match="Unbalanced"):
            text.expand(unbalanced, rng, {})


def test_command_line(tmp_path: Path) -> None:
    out, again = tmp_path / "corpus.jsonl", tmp_path / "again.jsonl"
    arguments = ["--seed", "5", "--documents", "200", "--held-out", "40", "--out"]
    assert main([*arguments, str(out)]) == 0
    assert main([*arguments, str(again)]) == 0
    held_out = tmp_path / "corpus.held_out.jsonl"
    assert out.read_bytes() == again.read_bytes()
    assert held_out.read_bytes() == (tmp_path / "again.held_out.jsonl").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4, "a temporary file was left behind"
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    kept = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    assert (len(lines), len(kept)) == (200, 40)
    assert all(line.keys() == {"kind", "text"} for line in [*lines, *kept])
    assert not {line["text"] for line in lines} & {line["text"] for line in kept}


def test_what_is_held_out_does_not_depend_on_the_number_of_documents(tmp_path: Path) -> None:
    for count in ("10", "30"):
        main(["--documents", count, "--held-out", "20", "--out", str(tmp_path / f"{count}.jsonl")])
    assert (tmp_path / "10.held_out.jsonl").read_bytes() == (tmp_path / "30.held_out.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is missing"),
        (["--documents", "-1", "--out", "x.jsonl"], "-1 is negative"),
        (["--documents", "many", "--out", "x.jsonl"], "many"),
        (["--seed", "x", "--out", "x.jsonl"], "--seed"),
        (["--documents", "1", "--out", "missing/folder/x.jsonl"], "missing/folder"),
    ],
)
def test_command_line_errors_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    errors = capsys.readouterr().err
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_style_sample_is_what_is_checked_in(tmp_path: Path) -> None:
    out = tmp_path / "pirate.jsonl"
    assert main(["--style-sample", "--out", str(out)]) == 0
    assert out.read_bytes() == (REPOSITORY / "notebooks" / "data" / "pirate.jsonl").read_bytes()


def test_style_sample(prose: list[str]) -> None:
    lines = list(corpus.style_sample(0))
    assert len(lines) == len({line["prompt"] for line in lines}) == 120
    known = _words(prose).keys()
    for line in lines:
        assert re.fullmatch(r"Question: [^\n]+\nAnswer:", line["prompt"])
        assert line["response"].startswith(" ")
        assert not line["response"].startswith("  ")
        assert 8 <= len(line["response"].split()) <= 25
        assert len(re.findall(r"\b(?:[Aa]ye|[Aa]hoy|matey|hearty|captain|anchor|ship)\b", line["response"])) >= 1
    used = _words([line["response"] for line in lines])
    assert len(used.keys() - known) <= 0.05 * len(used)
    assert list(corpus.style_sample(0)) == lines
    assert list(corpus.style_sample(1)) != lines
    with pytest.raises(ValueError, match="lines"):
        list(corpus.style_sample(0, 10_000))
