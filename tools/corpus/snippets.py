"""Small Python functions with a docstring and an example that holds.

Each snippet ends in lines ``print(...)  # result``: the results are what the snippet prints when it is run, for it is
run here.
"""

from __future__ import annotations

import contextlib
import io
import random
from string import Template

from tools.corpus.snippet_templates import SNIPPETS, TOGETHER, Snippet


def _marks(rng: random.Random, snippet: Snippet) -> dict[str, str]:
    marks = {name: value(rng) for name, value in snippet.values.items()}
    for together, names in TOGETHER:
        if together in marks and f"${names[0]}" in snippet.does + snippet.code:
            marks.update(zip(names, marks.pop(together).split(), strict=True))
    return marks


def run(source: str) -> list[str]:
    """Runs a snippet and returns the lines that it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "<snippet>", "exec"), {"__name__": "snippet"})
    return printed.getvalue().splitlines()


def _make(rng: random.Random, chosen: Snippet) -> str:
    marks = _marks(rng, chosen)
    does = Template(chosen.does).substitute(marks)
    code = Template(chosen.code).substitute(marks | {"doc": f'"""{does}"""'})
    examples = [f"print({Template(example).substitute(marks)})" for example in chosen.examples]
    # Where the code ends in top-level statements, the examples follow at once; after a function, two lines below.
    if code.splitlines()[-1].startswith(" "):
        code += "\n\n"
    printed = run("\n".join([code, *examples]))
    lines = "\n".join(f"{example}  # {line}" for example, line in zip(examples, printed, strict=True))
    head = f"# {does}\n\n" if rng.random() < 0.25 else ""
    return f"{head}{code}{lines}"


def snippet(rng: random.Random) -> str:
    """Returns one or two pieces of Python code whose stated examples hold."""
    return "\n\n\n".join(_make(rng, chosen) for chosen in rng.sample(SNIPPETS, rng.choice((1, 2))))
