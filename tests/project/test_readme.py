"""What the README shows, runs."""

import io
import pathlib
import re
import shlex

import pytest

from gemma2_keras import cli

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


COMMANDS = [
    line for block in blocks("sh") for line in block.replace("\\\n", "").splitlines() if line.startswith("gemma2-keras")
]


@pytest.mark.once
@pytest.mark.parametrize("line", COMMANDS)
def test_command_line_runs(line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is ice?\n"))
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.once
def test_files_that_are_linked_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.once
def test_two_commands_exist():
    for name in ("quickstart", "test"):
        assert f"bash tools/{name}" in README
        assert (ROOT / "tools" / name).is_file()
