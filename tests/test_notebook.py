"""Run the cells of the notebook, one after another in one process."""

import json
import logging
import os
import warnings
from contextlib import redirect_stdout
from io import StringIO

import matplotlib.pyplot as plt
import pytest
import torch
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

NOTEBOOK = json.loads((REPOSITORY / "recipes" / "notebook" / "quickstart.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def _quiet_only_here():
    """Undo what the first cell silences, on which other tests depend."""
    logger, bars = logging.getLogger("lightning.pytorch"), are_progress_bars_disabled()
    level = logger.level
    with warnings.catch_warnings():
        yield
    logger.setLevel(level)
    (disable_progress_bars if bars else enable_progress_bars)()


@pytest.mark.usefixtures("_quiet_only_here")
def test_the_cells_train_plot_and_generate(tmp_path, monkeypatch):
    """Run the code without a kernel, because ipykernel would bring fifteen packages and test nothing more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    plt.switch_backend("agg")
    shown, space = StringIO(), {"__name__": "notebook"}
    with redirect_stdout(shown):
        for number, cell in enumerate(CELLS, 1):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
    lines = plt.gcf().axes[0].lines
    assert [line.get_label().split(",")[0] for line in lines] == ["CoLA", "full rank"]
    assert all(line.get_ydata()[-1] < line.get_ydata()[0] - 0.5 for line in lines)
    plt.close("all")
    assert all(perplexity < 256 for perplexity in space["perplexities"].values())
    said = shown.getvalue()
    assert "\nThe people of the United States" in said
    assert said.endswith("True\n")  # what was written is what is read
    assert torch.equal(space["again"](space["ids"]), space["network"](space["ids"]))
    assert os.listdir(tmp_path)


def test_the_notebook_shows_what_its_cells_printed_and_drew():
    kinds = {output["output_type"] for cell in CELLS for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}  # no error
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
