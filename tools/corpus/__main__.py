"""The command line: `python -m tools.corpus`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NoReturn

from tools.corpus import documents, style_sample

STYLE_SAMPLE = Path("notebooks/data/pirate.jsonl")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def write_json_lines(path: Path, objects: Iterable[Mapping[str, str]]) -> int:
    """Writes one object a line to a temporary file beside `path`, renames it to `path`, and returns their number."""
    count = 0
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            for line in objects:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        # mkstemp's files are for their owner alone.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return count


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _Parser(prog="python -m tools.corpus", description="Write the corpus, or the sample for fine-tuning.")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: %(default)s)")
    parser.add_argument("--documents", type=_count, default=30000, help="number of documents (default: %(default)s)")
    parser.add_argument("--held-out", type=_count, default=500, help="documents kept apart (default: %(default)s)")
    parser.add_argument("--style-sample", action="store_true", help="write the captain's answers instead")
    parser.add_argument("--out", type=Path, help=f"the file to write (with --style-sample: {STYLE_SAMPLE})")
    options = parser.parse_args(arguments)
    out: Path | None = options.out or (STYLE_SAMPLE if options.style_sample else None)
    if out is None:
        parser.error("--out is missing")
    try:
        if options.style_sample:
            print(f"{out}: {write_json_lines(out, style_sample(options.seed))} lines")
            return 0
        made = (asdict(document) for document in documents(options.seed, options.held_out + options.documents))
        # What is held out comes first: it stays the same when the number of documents changes.
        held_out = out.with_suffix(".held_out.jsonl")
        print(f"{held_out}: {write_json_lines(held_out, islice(made, options.held_out))} documents")
        print(f"{out}: {write_json_lines(out, made)} documents")
    except OSError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
