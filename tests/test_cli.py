from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma2_keras import Gemma2CausalLM, WontFit, __version__, describe_preset, list_presets
from gemma2_keras.cli import main
from gemma2_keras.training import job
from gemma2_keras.training.recipe import Recipe, read_settings, settings, to_yaml
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
        (["The cat", "--preset", "PRESET", "--max-new-tokens", "0"], "`--max-new-tokens` must be a whole number"),
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
        if path.name not in ("tokenizer.model", "tokenizer.json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "has no tokenizer" in fails(capsys, "generate", "The cat", "--preset", str(tmp_path))


@pytest.mark.once
@pytest.mark.parametrize("action", [[], ["list"]])
def test_every_preset_is_listed(capsys, action):
    assert main(["presets", *action]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[1:]] == list_presets()
    assert "2,614,341,888" in listed
    assert max(map(len, listed.splitlines())) <= 80
    assert "\x1b" not in listed


@pytest.mark.once
def test_a_preset_is_shown(capsys):
    assert main(["presets", "show", "gemma2_2b_en"]) == 0
    assert capsys.readouterr().out == f"{describe_preset('gemma2_2b_en')}\n"


@pytest.mark.once
def test_a_terminal_shows_a_preset_in_colours(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["presets", "show", "gemma2_2b_en"]) == 0
    assert "\x1b[36m" in capsys.readouterr().out


@pytest.mark.once
def test_a_model_that_does_not_fit_is_one_line(capsys, monkeypatch):
    def refuse(*_, **__):
        raise WontFit("The model needs 10.5 GB.")

    monkeypatch.setattr(Gemma2CausalLM, "from_preset", refuse)
    assert "The model needs 10.5 GB." in fails(capsys, "generate", "The cat")


@pytest.mark.once
def test_an_unknown_preset_is_not_shown(capsys):
    assert "Did you mean gemma2_2b_en" in fails(capsys, "presets", "show", "gemma2_2b_e")


@pytest.mark.once
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["zebra"],
        ["presets", "zebra"],
        ["presets", "show"],
        ["generate"],
        ["generate", "The cat", "--zebra"],
        ["generate", "The cat", "--max-new-tokens", "many"],
        ["--backend", "numpy", "presets", "list"],
        ["finetune", "--rank", "many"],
        ["finetune", "--truncation", "middle"],
        ["finetune", "a.jsonl", "b.jsonl"],
    ],
)
def test_unusable_arguments_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: gemma2-keras" in capsys.readouterr().err


@pytest.mark.once
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["generate", "--help"], ["finetune", "--help"]])
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


@pytest.fixture
def asked(monkeypatch) -> list[Recipe]:
    """What would be carried out, in place of doing it."""
    recipes: list[Recipe] = []
    monkeypatch.setattr(job, "run_recipe", recipes.append)
    return recipes


@pytest.mark.once
def test_flags_are_settings(asked):
    words = """finetune data.jsonl --preset gemma2_tiny_en --output adapter --rank 16 --targets q_proj,down_proj
        --epochs 3 --learning-rate 1e-3 --sequence-length 512 --batch-size 4 --packing --validation val.jsonl
        --run-folder run --resume --alpha 32 --use-dora --use-rslora --dtype bfloat16 --every-minutes 0.5"""
    assert main(shlex.split(words)) == 0
    assert main(["finetune", "--targets", "all-linear", "data.jsonl", "--truncation", "drop", "--no-packing"]) == 0
    assert asked[0] == Recipe(
        data="data.jsonl",
        output="adapter",
        rank=16,
        targets=["q_proj", "down_proj"],
        epochs=3,
        learning_rate=1e-3,
        sequence_length=512,
        batch_size=4,
        packing=True,
        validation="val.jsonl",
        run_folder="run",
        resume=True,
        alpha=32,
        use_dora=True,
        use_rslora=True,
        dtype="bfloat16",
        every_minutes=0.5,
    )
    assert asked[1] == Recipe(data="data.jsonl", targets="all-linear", truncation="drop")


@pytest.mark.once
def test_flags_override_the_file_and_the_file_the_defaults(asked, tmp_path):
    file = tmp_path / "finetune.yaml"
    file.write_text("data: a.jsonl\nrank: 4\npacking: true\nepochs: 2\nlearning_rate: 1e-3\n")
    assert main(["finetune", "--config", str(file), "b.jsonl", "--no-packing", "--epochs", "5"]) == 0
    assert asked == [Recipe(data="b.jsonl", rank=4, epochs=5, learning_rate=1e-3)]


@pytest.mark.once
def test_settings_are_printed_as_a_file_to_start_from(asked, capsys, tmp_path):
    assert main(["finetune", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert printed == to_yaml(Recipe())
    assert all(setting.help in printed for setting in settings().values())
    assert main(["finetune", "data.jsonl", "--targets", "q_proj,v_proj", "--rank", "3", "--print-config"]) == 0
    file = tmp_path / "finetune.yaml"
    file.write_text(capsys.readouterr().out)
    assert Recipe(**read_settings(file)) == Recipe(data="data.jsonl", rank=3)
    assert not asked


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`data` is missing: name a file of JSON lines"),
        (["absent.jsonl", "--output", "out"], "absent.jsonl"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--config", "FILE"], "line 2: there is no setting 'rnak'. Did you mean rank"),
        (["data.jsonl", "--rank", "0"], "`rank` must be a whole number, at least 1; given 0"),
        (["data.jsonl", "--targets", "q_proj,"], "`targets` must be a string or a list of strings"),
        (["data.jsonl", "--resume"], "`resume` needs the `run_folder`"),
    ],
)
def test_what_cannot_be_trained_is_one_line(capsys, tmp_path, arguments, message):
    file = tmp_path / "finetune.yaml"
    file.write_text("epochs: 2\nrnak: 8\n")
    error = fails(capsys, "finetune", *[str(file) if word == "FILE" else word for word in arguments])
    assert message in error


@pytest.fixture
def examples(tmp_path) -> Path:
    path = tmp_path / "my data.jsonl"
    lines = [{"prompt": f"The {animal}", "response": " sat by the sea."} for animal in ("cat", "dog", "girl", "house")]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.once
@pytest.mark.slow
def test_training_is_interrupted_and_goes_on(preset, examples, tmp_path, capsys):
    """As a user does it: Ctrl-C, then the line that was shown."""
    output, history = tmp_path / "adapter", tmp_path / "run" / "history.jsonl"
    words = [
        "finetune",
        str(examples),
        "--preset",
        preset,
        "--output",
        str(output),
        "--run-folder",
        str(tmp_path / "run"),
    ]
    words += ["--epochs", "200", "--validation-split", "0.25", "--sequence-length", "16"]
    with run(*words, stdout=subprocess.PIPE) as process:
        while process.poll() is None and not (history.exists() and history.read_text().count("\n") > 2):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Validation before training: loss" in out
    assert not output.exists()
    command = next(line for line in errors.splitlines() if line.startswith("gemma2-keras "))
    assert errors == f"\nInterrupted; to go on:\n\n{command}\n\n"
    assert shlex.split(command)[1:] == [*words, "--resume"]
    made = history.read_text().count('"step"')
    assert made < 200
    assert main(shlex.split(command)[1:]) == 0
    assert "Validation before and after: loss" in capsys.readouterr().out
    assert (output / "adapter_config.json").exists()
    steps = [json.loads(line)["step"] for line in history.read_text().splitlines() if '"step"' in line]
    assert steps == list(range(1, 201))


@pytest.mark.once
def test_without_a_folder_of_the_run_ctrl_c_says_what_was_missing(monkeypatch, capsys):
    def interrupt(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run_recipe", interrupt)
    assert main(["finetune", "data.jsonl"]) == 130
    assert "nothing is kept: with --run-folder" in capsys.readouterr().err


def test_training_by_the_command_line_makes_an_adapter_that_loads(preset, examples, tmp_path, capsys):
    output = tmp_path / "adapter"
    words = ["finetune", str(examples), "--preset", preset, "--output", str(output), "--targets", "all-linear"]
    assert (
        main([*words, "--epochs", "4", "--learning-rate", "0.05", "--batch-size", "2", "--sequence-length", "16"]) == 0
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    line = next(line for line in captured.out.splitlines() if line.startswith("from gemma2_keras"))
    names: dict = {}
    exec(line, names)
    assert names["model"].adapters == ["default"]
    first, last = map(float, re.search(r"Training loss: ([\d.]+) -> ([\d.]+)", captured.out).groups())
    assert last < first


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


@pytest.mark.once
@pytest.mark.parametrize(
    ("closed", "words", "status"),
    [
        ("<&-", "generate -", 1),
        ("<&-", "chat", 0),
        (">&-", "generate The", 0),
        ("2>&-", "generate The", 0),
        ("<&- >&- 2>&-", "generate The", 0),
    ],
)
def test_closed_streams_are_no_fault(preset, closed, words, status):
    command = f"{sys.executable} -m gemma2_keras.cli {words} --preset {preset} --max-new-tokens 2 {closed}"
    ended = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    if status:
        assert "standard input is empty or closed" in ended.stderr


@pytest.mark.parametrize(
    ("to", "out", "dtype"),
    [("transformers", "out", "bfloat16"), ("keras-hub", "out", None), ("gguf", "x.gguf", "q8_0")],
)
def test_convert_writes_what_was_asked_for(tmp_path, capsys, to, out, dtype):
    options = [] if dtype is None else ["--dtype", dtype]
    assert main(["convert", "gemma2_tiny_en", str(tmp_path / out), "--to", to, *options]) == 0
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / out}\n"
    # What the other program would compute otherwise is a line, too.
    assert ("gemma2-keras: warning: " in output.err) == (to != "transformers")
    assert ".py" not in output.err
    if dtype != "q8_0":
        # As asked, or as the small preset is kept.
        assert Gemma2CausalLM.from_preset(tmp_path / out).backbone.dtype_policy.name == "bfloat16"


def test_convert_says_what_is_wrong_in_one_line(tmp_path, capsys):
    arguments = ["convert", "gemma2_tiny_en", str(tmp_path / "out"), "--to", "keras-hub", "--dtype", "q8_0"]
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("gemma2-keras: `--dtype` must be float32, bfloat16, float16")
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "out"), "--to", "gguf"]) == 1
    assert "There is no folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_help_is_shown_whatever_the_encoding():
    command = [sys.executable, "-m", "gemma2_keras.cli", "generate", "--help"]
    shown = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert shown.returncode == 0
    assert "\\u2026" in shown.stdout
    assert not shown.stderr
