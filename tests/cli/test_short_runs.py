"""Run the quick-start for few steps, with a small network: it ends with a validation of its last step."""

import pytest

from cola_lightning.cli.app import main
from tests.conftest import REPOSITORY, curve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("work_folder")]
SMALL = [
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false", "--model.vocab_size=300",
    "--model.hidden_size=32", "--model.intermediate_size=48", "--model.num_hidden_layers=1",
    "--model.num_attention_heads=2", "--model.projection.rank=4",
]  # fmt: skip


@pytest.mark.parametrize("steps", [3, 50])
def test_the_quick_start_ends_with_a_validation_after_any_number_of_steps(steps, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run_dir = tmp_path / "run"
    main([
        "fit", f"--config={REPOSITORY / 'configs/quickstart.yaml'}", *SMALL, f"--trainer.max_steps={steps}",
        f"--data.paths={corpus}", "--data.vocab_size=300", "--data.sequence_length=8", "--data.batch_size=1",
        f"--data.cache_dir={tmp_path / 'cache'}", "--run_dir=~/run",
    ])  # fmt: skip
    assert list(curve(run_dir, "val/perplexity")) == [steps - 1]  # fewer than its interval of 250
    shown = capsys.readouterr().err
    assert f"step {steps:,} of {steps:,} after" in shown
    assert ("no loss logged, because --trainer.log_every_n_steps is 10" in shown) == (steps < 10)
    assert "logging interval" not in shown
    assert (run_dir / "checkpoints" / f"step_{steps:08}.ckpt").is_file()
