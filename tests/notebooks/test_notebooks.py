"""Every notebook runs from end to end, on each backend."""

import pathlib
import re
import shutil

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"


def run(name, folder):
    """All that the cells print."""
    content = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    shutil.copytree(FOLDER / "data", folder / "data")
    # The kernel inherits KERAS_BACKEND, and writes into its own folder.
    nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in content.cells for output in cell.get("outputs", ())]
    # A value is shown once, and has a text for where there is no HTML.
    assert not [output for output in outputs if output.output_type == "display_data"]
    assert all(output.data["text/plain"] for output in outputs if output.output_type == "execute_result")
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_quickstart_runs(tmp_path):
    run("01_quickstart", tmp_path)
    assert (tmp_path / "captain" / "model.safetensors").exists()


def test_fine_tuning_runs_and_improves_what_was_held_out(tmp_path):
    printed = run("02_lora_fine_tuning", tmp_path)
    before, after = map(float, re.search(r"perplexity ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < before / 10
    assert (tmp_path / "support" / "adapter_model.safetensors").exists()
    # To questions that it has never seen, in the manner of the shop, and then it stops.
    answers = re.findall(r"  after:  (.*)\n  shop:   (.*)\n", printed)
    assert len(answers) == 6
    assert all(answer.endswith("Have a lovely day!") for answer, _ in answers)


def test_exports_say_the_same_everywhere(tmp_path):
    printed = run("03_presets_and_export", tmp_path)
    theirs, ours = re.search(r"transformers: (.*)\n +ours: (.*)\n", printed).groups()
    assert theirs == ours == "Aye, the cat sleeps in the boat, matey!"
    quantised, broken = re.findall(r"^CheckpointError: (.*)$", printed, re.MULTILINE)
    assert "Q8_0" in quantised
    assert "truncated" in broken
    for written in ("gguf/captain.gguf", "gguf-q8/Modelfile", "captain-keras-hub/task.json"):
        assert (tmp_path / written).exists()
    assert (tmp_path / "captain-bfloat16" / "config.json").exists()


@pytest.mark.once
def test_every_notebook_is_run():
    names = {path.stem for path in FOLDER.glob("*.ipynb")}
    assert names == {"01_quickstart", "02_lora_fine_tuning", "03_presets_and_export"}
    for name in names:
        cells = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
        # The outputs that are kept are those of one run from the top.
        counts = [cell.execution_count for cell in cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))
