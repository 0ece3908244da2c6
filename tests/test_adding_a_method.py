"""Run the worked example of docs/adding_a_method.md as it is written there."""

import importlib
import re
import sys

import pytest
import torch

from cola_lightning.checkpoints import read
from cola_lightning.cli.app import main
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write the files of the page into a folder, and make it the working directory."""
    page = (REPOSITORY / "docs" / "adding_a_method.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "gained.py").write_text("\n".join(text for kind, text in blocks if kind == "python"))
    (tmp_path / "gained.yaml").write_text("\n".join(text for kind, text in blocks if kind == "yaml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("gained", None)


def test_it_trains_and_its_callback_acts(written, tiny_run):
    main(["fit", *tiny_run, "--config=gained.yaml", f"--run_dir={written / 'run'}", "--trainer.max_steps=3"])
    weights = read(written / "run" / "checkpoints" / "last.ckpt").weights
    gains = [tensor for name, tensor in weights.items() if name.endswith("gain")]
    assert len(gains) == 2 * 7
    # The factors were merged after step 2, so that they hold the change of one step.
    assert all(0 < (gain - 1).abs().max() < 0.02 for gain in gains)


def test_a_merge_leaves_the_output_as_it_was(written):
    gained = importlib.import_module("gained")
    projection = gained.Gained(12, 20, rank=4).double()
    torch.nn.init.uniform_(projection.gain, 0.5, 2.0)
    x = torch.randn(3, 12, dtype=torch.float64)
    before = projection(x)
    torch.testing.assert_close(x @ projection.dense().T, before, rtol=1e-12, atol=1e-12)
    callback = gained.GainMerge(every=2)
    callback.projections = [projection]
    with torch.no_grad():
        callback.after_step(None, 2)
    torch.testing.assert_close(projection(x), before, rtol=1e-12, atol=1e-12)
    assert projection.gain.eq(1).all()
    assert sum(parameter.numel() for parameter in projection.parameters()) == 4 * (12 + 20 + 1)
