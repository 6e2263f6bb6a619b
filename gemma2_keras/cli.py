"""The command line `gemma2-keras`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma2_keras import __version__
from gemma2_keras.training.recipe import Recipe, Setting, read_settings, settings, to_yaml

# Leaves out what TensorFlow, and what it loads, say of themselves when they are imported, whatever they are told.
_SIEVE = r"""
import re, sys
for line in sys.stdin.buffer:
    if not re.match(rb"I\d{4} |WARNING: All log messages before absl::InitializeLog", line):
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
"""

# What messages say to who writes Python, and what that is here.
_WORDS = {
    "`check_finite=False`": "`--no-check-finite`",
    "`gemma2_keras.list_presets()`": "`gemma2-keras presets`",
    "`from_preset`": "`--preset`",
    "`max_new_tokens`": "`--max-new-tokens`",
    "`dtype`": "`--dtype`",
    "`save_to_preset` keeps it.": "",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what goes wrong is one line on standard error.

    Args:
        arguments: the words after the program's name; `None` takes them from the command line.

    Returns:
        The exit status: 0, 1 if the command failed, 130 if it was interrupted. Unusable arguments exit with 2.
    """
    _open_streams()
    # A terminal that cannot show a character of the text shows its code instead.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    options.words = sys.argv[1:] if arguments is None else list(arguments)
    # Keras and TensorFlow read these once, when they are first imported.
    if options.backend:
        os.environ["KERAS_BACKEND"] = options.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        options.run(options)
        # A reader who left is noticed here, not when the interpreter ends.
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing more may be flushed into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        print(f"gemma2-keras: {_line(error) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _line(message: object) -> str:
    """A message in one line, with the words of the command line in place of Python's."""
    line = " ".join(str(message).split())
    for python, here in _WORDS.items():
        line = line.replace(python, here)
    return line


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Import libraries without their chatter on standard error; warnings and errors come through.

    They write past Python, so that a process of its own looks at each line: it shows the last ones of a crash, too.
    """
    # Where standard error is closed, nothing has to be kept from it.
    if "tensorflow" in sys.modules or isinstance(sys.stderr, io.StringIO | None):
        yield
        return
    sys.stderr.flush()
    command = [sys.executable, "-I", "-S", "-c", _SIEVE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as sieve:
        assert sieve.stdin is not None
        shown = os.dup(2)
        os.dup2(sieve.stdin.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)


def _open_streams() -> None:
    """Put what is empty, and takes all, in place of standard streams that whoever started us has closed."""
    sys.stdin = sys.stdin or io.StringIO()
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gemma2-keras", description="Gemma 2 for Keras 3.")
    parser.add_argument("--version", action="version", version=f"gemma2-keras {__version__}")
    parser.add_argument("--backend", choices=("jax", "torch", "tensorflow"), help="Keras backend (default: Keras' own)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("prompt", help="the text to continue; - reads standard input")
    _add_generation(generate, max_new_tokens=64)
    generate.add_argument("--strip-prompt", action="store_true", help="print the continuation alone")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model, line by line. /reset begins anew; /exit, or the end of the input, leaves.",
    )
    _add_generation(chat)
    chat.add_argument("--system", help="instructions that stand before the conversation")
    chat.add_argument("--stats", action="store_true", help="print tokens per second after each reply")
    chat.set_defaults(run=_chat)

    finetune = commands.add_parser(
        "finetune",
        help="train an adapter, or all weights, on a file of examples",
        description="Train an adapter, or all weights. Settings come from flags, and from a YAML file where there are "
        "none; --print-config writes such a file.",
    )
    _add_settings(finetune)
    finetune.set_defaults(run=_finetune)

    convert = commands.add_parser(
        "convert",
        help="write a preset in another format",
        description="Write a preset in the format of transformers, KerasHub or llama.cpp, one tensor at a time.",
    )
    convert.add_argument("source", metavar="IN", help="name, handle, folder or GGUF file")
    convert.add_argument("target", metavar="OUT", help="folder, or for gguf the file, to write")
    convert.add_argument("--to", required=True, choices=("transformers", "keras-hub", "gguf"))
    convert.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "q8_0"), help="q8_0 for gguf (default: the weights')"
    )
    convert.add_argument("--adapter", metavar="FOLDER", help="an adapter to merge into the weights")
    convert.add_argument(
        "--check-finite",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refuse weights that are NaN or infinite",
    )
    convert.set_defaults(run=_convert)

    presets = commands.add_parser("presets", help="list the presets, or show one")
    presets.set_defaults(run=_list_presets)
    actions = presets.add_subparsers(metavar="ACTION")
    actions.add_parser("list", help="every name, with its size; as without an action")
    show = actions.add_parser("show", help="what is known of one")
    show.add_argument("name")
    show.set_defaults(run=_show_preset)
    return parser


def _add_generation(parser: argparse.ArgumentParser, max_new_tokens: int | None = None) -> None:
    parser.add_argument(
        "--preset", default="gemma2_tiny_en", help="name, hf:// handle or folder (default: %(default)s)"
    )
    parser.add_argument("--dtype", help="float32, bfloat16, float16 … (default: the checkpoint's)")
    usual = "a quarter of the context, 512 at most" if max_new_tokens is None else max_new_tokens
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"default: {usual}")
    parser.add_argument(
        "--sampler", default="greedy", help="greedy, top_k, top_p, random, beam … (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy; higher is more varied")
    parser.add_argument("--top-k", type=int, metavar="N", help="only the N likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens of this probability")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--seed", type=int, help="make random sampling repeatable")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of a recipe; what is not given is left to the file, or else to the default."""
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings; flags override it")
    parser.add_argument("--print-config", action="store_true", help="print all settings as such a file, and end")
    groups: dict[str, Any] = {}
    for name, setting in settings().items():
        if setting.section not in groups:
            groups[setting.section] = parser.add_argument_group(setting.section)
        default = getattr(Recipe, name)
        shown = ",".join(default) if isinstance(default, tuple) else default
        usual = "" if default is None or default is False else f" (default: {shown})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{setting.help}{usual}".replace("%", "%%")}
        if name == "data":
            groups[setting.section].add_argument(name, nargs="?", metavar="DATA", **options)
        else:
            groups[setting.section].add_argument(f"--{name.replace('_', '-')}", **options, **_form(setting))


def _form(setting: Setting) -> dict[str, Any]:
    """How a flag is read."""
    if setting.kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if setting.choices:
        return {"choices": setting.choices}
    if setting.kind is list:
        return {"type": lambda text: text.split(",") if "," in text else text, "metavar": "NAME[,NAME…]"}
    return {"type": setting.kind, "metavar": {int: "N", float: "X", str: "TEXT"}[setting.kind]}


def _loaded(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model, and the options of what it generates."""
    with quiet_imports():
        from gemma2_keras import Gemma2CausalLM

    model = Gemma2CausalLM.from_preset(options.preset, dtype=options.dtype)
    if model.preprocessor is None:
        raise ValueError(
            f"{options.preset} has no tokenizer, so that it cannot read a prompt: put its tokenizer.model there."
        )
    model.compile(sampler=options.sampler)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "stop", "seed")
    return model, {name: value for name in names if (value := getattr(options, name)) is not None}


def _generate(options: argparse.Namespace) -> None:
    prompt = options.prompt
    if prompt == "-":
        prompt = sys.stdin.read()
        if not prompt:
            raise ValueError("standard input is empty or closed: write the prompt there, or give it as an argument.")
    model, how = _loaded(options)
    if options.sampler in ("beam", "contrastive"):
        print(model.generate(prompt, strip_prompt=options.strip_prompt, **how))
        return
    for piece in model.stream(prompt, strip_prompt=options.strip_prompt, **how):
        print(piece, end="", flush=True)
    print()


def _chat(options: argparse.Namespace) -> None:
    model, how = _loaded(options)
    chat = model.chat(system=options.system, **how)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return
        except UnicodeDecodeError as error:
            print(f"gemma2-keras: that line is not UTF-8 text ({error.reason}).", file=sys.stderr)
            continue
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
        elif text:
            _reply(chat, text, options.stats)


def _reply(chat: Any, text: str, stats: bool) -> None:
    """One turn; what goes wrong in it, or Ctrl-C, ends the turn and not the conversation."""
    try:
        for piece in chat.stream(text):
            print(piece, end="", flush=True)
    except ValueError as error:
        print(f"gemma2-keras: {error}", file=sys.stderr)
        return
    except KeyboardInterrupt:
        pass
    print(f"\n[{chat.stats}]" if stats and chat.stats else "")


def _convert(options: argparse.Namespace) -> None:
    with quiet_imports():
        from gemma2_keras.checkpoints.exporting import convert
        from gemma2_keras.checkpoints.gguf.writing import modelfile_of

    given = {name: getattr(options, name) for name in ("dtype", "adapter", "check_finite")}
    with _warnings_in_a_line():
        convert(options.source, options.target, options.to, **given)
    print(options.target)
    modelfile = modelfile_of(Path(options.target))
    if options.to == "gguf" and modelfile.exists():
        print(f"gemma2-keras: for Ollama there is {modelfile}", file=sys.stderr)


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Show a warning as an error is shown: without the place in the code that it comes from."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"gemma2-keras: warning: {_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _finetune(options: argparse.Namespace) -> None:
    given = {} if options.config is None else read_settings(options.config)
    recipe = Recipe(**given | {name: getattr(options, name) for name in settings() if hasattr(options, name)})
    if options.print_config:
        print(to_yaml(recipe), end="")
        return
    with quiet_imports():
        from gemma2_keras.training.job import run_recipe
        from gemma2_keras.training.run_folder import RunFolder

    try:
        run_recipe(recipe)
    except KeyboardInterrupt:
        if recipe.run_folder is None:
            print("\nInterrupted; nothing is kept: with --run-folder, a run can go on.", file=sys.stderr)
        elif RunFolder(recipe.run_folder).checkpoints:
            words = ["gemma2-keras", *options.words, *["--resume"] * (not recipe.resume)]
            print(f"\nInterrupted; to go on:\n\n{shlex.join(words)}\n", file=sys.stderr)
        raise


def _list_presets(options: argparse.Namespace) -> None:
    from gemma2_keras import describe_preset, list_presets
    from gemma2_keras.checkpoints.description import as_list

    _show(as_list([describe_preset(name) for name in list_presets()]))


def _show_preset(options: argparse.Namespace) -> None:
    from gemma2_keras import describe_preset

    _show(describe_preset(options.name))


def _show(page: Any) -> None:
    """Print with colours and as wide as the terminal is; into a file or pipe, plainly and at most 80 columns wide."""
    from rich.console import Console

    from gemma2_keras.checkpoints.description import plain_text

    console = Console()
    if console.is_terminal:
        console.print(page)
    else:
        print(plain_text(page))


if __name__ == "__main__":
    sys.exit(main())
