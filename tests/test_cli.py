from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma2_keras import Gemma2CausalLM, __version__, list_presets
from gemma2_keras.cli import main
from tests.preprocessing import tiny

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "preset"
    tiny.causal_lm(num_layers=1, sequence_length=48).save_to_preset(folder)
    return str(folder)


def fails(capsys, *arguments: str) -> str:
    """The one line on standard error."""
    assert main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gemma2-keras: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def test_generate_prints_what_the_model_says(preset, capsys, monkeypatch):
    expected = Gemma2CausalLM.from_preset(preset).generate("The cat", max_new_tokens=4)
    assert main(["generate", "The cat", "--preset", preset, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr() == (expected + "\n", "")
    arguments = ["generate", "-", "--preset", preset, "--max-new-tokens", "4", "--strip-prompt"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("The cat"))
    assert main(arguments) == 0
    assert "The cat" + capsys.readouterr().out == expected + "\n"


@pytest.mark.once
def test_how_tokens_are_chosen_is_asked_for(preset, capsys):
    model = Gemma2CausalLM.from_preset(preset)
    how = {"temperature": 5.0, "top_k": 40, "top_p": 0.9, "seed": 3}
    expected = model.generate("The cat", max_new_tokens=6, **how)
    flags = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["generate", "The cat", "--preset", preset, "--max-new-tokens", "6", *flags]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert expected != model.generate("The cat", max_new_tokens=6)
    assert (
        main(["generate", "The cat", "--preset", preset, "--max-new-tokens", "6", "--stop", "cat", "--stop", "x"]) == 0
    )
    model.compile(sampler="beam")
    beam = model.generate("The cat", max_new_tokens=3)
    capsys.readouterr()
    assert main(["generate", "The cat", "--preset", preset, "--max-new-tokens", "3", "--sampler", "beam"]) == 0
    assert capsys.readouterr().out == beam + "\n"


def test_a_conversation_is_read_line_by_line(preset, capsys, monkeypatch):
    chat = Gemma2CausalLM.from_preset(preset).chat(system="Be kind.", max_new_tokens=3)
    first, second = chat.send("The cat"), chat.send("The dog")
    chat.reset()
    again = chat.send("The dog")
    monkeypatch.setattr("sys.stdin", io.StringIO("The cat\n\nThe dog\n/reset\nThe dog\n/exit\nThe end\n"))
    assert main(["chat", "--preset", preset, "--max-new-tokens", "3", "--system", "Be kind."]) == 0
    assert capsys.readouterr().out == f"{first}\n{second}\n{again}\n"


@pytest.mark.once
def test_what_goes_wrong_in_a_turn_does_not_end_the_conversation(preset, capsys, monkeypatch):
    reply = Gemma2CausalLM.from_preset(preset).chat(max_new_tokens=3).send("The cat")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'The cat ' * 40}\nThe cat\n"))
    assert main(["chat", "--preset", preset, "--max-new-tokens", "3", "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("gemma2-keras: The conversation has")
    assert captured.out.startswith(reply)
    assert "3 new tokens" in captured.out


def test_a_seed_makes_a_random_text_repeatable(preset, capsys):
    texts = []
    for seed in (1, 1, 2):
        arguments = ["generate", "The cat", "--preset", preset, "--max-new-tokens", "12", "--sampler", "random"]
        assert main([*arguments, "--seed", str(seed)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["The cat", "--preset", "gemma2_2b"], "There is no preset 'gemma2_2b'. Did you mean"),
        (["The cat", "--preset", "./absent"], "There is no folder absent"),
        (["The cat", "--preset", ""], "`preset` is empty"),
        (["", "--preset", "PRESET"], "0 is an empty string"),
        (["The cat", "--preset", "PRESET", "--max-new-tokens", "0"], "`max_new_tokens` must be a whole number"),
        (["The cat", "--preset", "PRESET", "--sampler", "zebra"], "`sampler` must be one of beam,"),
        (["The cat", "--preset", "PRESET", "--dtype", "zebra"], "zebra"),
        (["The cat " * 100, "--preset", "PRESET"], "leaves no room within 96"),
        (["bad \udcff byte", "--preset", "PRESET"], "lone surrogate"),
    ],
)
def test_what_goes_wrong_is_one_line(preset, capsys, arguments, message):
    error = fails(capsys, "generate", *[preset if word == "PRESET" else word for word in arguments])
    assert message in error


@pytest.mark.once
def test_a_broken_checkpoint_is_one_line(preset, capsys, tmp_path):
    for path in Path(preset).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-20])
    assert ".json cannot be read as JSON" in fails(capsys, "generate", "The cat", "--preset", str(tmp_path))


@pytest.mark.once
def test_a_checkpoint_without_a_tokenizer_is_one_line(preset, capsys, tmp_path):
    for path in Path(preset).iterdir():
        if path.name != "tokenizer.model":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "has no tokenizer.model" in fails(capsys, "generate", "The cat", "--preset", str(tmp_path))


@pytest.mark.once
def test_every_preset_is_listed_and_shown(capsys):
    assert main(["presets", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in listed] == list_presets()
    assert main(["presets", "show", "gemma2_2b_en"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["parameters"] == "2,614,341,888"
    assert shown["weights"] == "hf://google/gemma-2-2b"
    assert shown["num_layers"] == "26"


@pytest.mark.once
def test_an_unknown_preset_is_not_shown(capsys):
    assert "Did you mean gemma2_2b_en" in fails(capsys, "presets", "show", "gemma2_2b_e")


@pytest.mark.once
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["zebra"],
        ["presets"],
        ["presets", "zebra"],
        ["presets", "show"],
        ["generate"],
        ["generate", "The cat", "--zebra"],
        ["generate", "The cat", "--max-new-tokens", "many"],
        ["--backend", "numpy", "presets", "list"],
    ],
)
def test_unusable_arguments_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: gemma2-keras" in capsys.readouterr().err


@pytest.mark.once
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["generate", "--help"]])
def test_help_and_version_exit_with_0(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out == f"gemma2-keras {__version__}\n" if arguments == ["--version"] else "usage: gemma2-keras" in out


@pytest.mark.once
def test_an_interruption_exits_with_130(monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("gemma2_keras.describe_preset", interrupt)
    assert main(["presets", "show", "gemma2_2b_en"]) == 130


def run(*arguments: str, **kwargs) -> subprocess.Popen:
    program = [sys.executable, "-c", "import sys; from gemma2_keras.cli import main; sys.exit(main())", *arguments]
    return subprocess.Popen(program, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.once
@pytest.mark.parametrize("action", [["list"], ["show", "gemma2_2b_en"]])
def test_a_reader_who_leaves_is_no_error(action):
    read, write = os.pipe()
    os.close(read)
    with run("presets", *action, stdout=write) as process:
        os.close(write)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.once
@pytest.mark.slow
def test_generating_says_nothing_on_standard_error():
    with run("generate", "The sun", "--max-new-tokens", "2", stdout=subprocess.DEVNULL) as process:
        _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.once
@pytest.mark.parametrize("end", ["pass", "os.abort()", "raise ImportError('no such library')"])
def test_of_what_is_said_during_imports_only_chatter_is_left_out(end):
    script = f"""
import os, sys
from gemma2_keras.cli import quiet_imports
with quiet_imports():
    for line in (b"WARNING: All log messages before absl::InitializeLog() is called", b"I0000 00:00 a.cc:1] idle"):
        os.write(2, line + b"\\n")
    os.write(2, b"E0000 00:00 b.cc:2] broken\\nW0000 odd\\nI am no log line\\n")
    print("a warning", file=sys.stderr)
    {end}
print("I0000 afterwards", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    lines = done.stderr.splitlines()
    assert lines[:4] == ["E0000 00:00 b.cc:2] broken", "W0000 odd", "I am no log line", "a warning"]
    expected = {"pass": "I0000 afterwards", "os.abort()": "a warning"}
    assert lines[-1] == expected.get(end, "ImportError: no such library")


@pytest.mark.once
def test_the_installed_command_is_this_one():
    command = Path(sys.executable).with_name("gemma2-keras")
    found = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == f"gemma2-keras {__version__}\n"
