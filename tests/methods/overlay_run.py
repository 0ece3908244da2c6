"""Runs of test_overlays.py: every config of ``configs/method`` under FSDP2, by flags alone."""

from pathlib import Path

import torch

from cola_lightning.cli.app import main
from tests.conftest import REPOSITORY

METHODS = sorted(file.stem for file in (REPOSITORY / "configs" / "method").glob("*.yaml"))
STEPS, LAST, BETWEEN = 4, "step_00000004.ckpt", "step_00000002.ckpt"
# A merge of ReLoRA, exchanges of SwitchLoRA, iterations and a round of SST, and new projectors within four steps
OFTEN = {
    "relora": {"model.schedule.cycle_steps": 2, "model.schedule.restart_warmup_steps": 1},
    "sst": {"model.schedule.cycle_steps": 1, "model.schedule.restart_warmup_steps": 0},
    **{name: {"model.optimizer.matrix.update_proj_gap": 2} for name in ("galore", "fira", "apollo", "apollo_mini")},
}


def fit_flags(method: str, corpus: str, run_dir: Path) -> list[str]:
    """Return the flags of a run of one method: configs and sizes."""
    # The configs of CoLA-M and LaX change that of CoLA.
    names = {"cola_m": ["cola", "cola_m"], "lax": ["cola", "lax"]}.get(method, [method])
    files = [*(f"method/{name}" for name in names), "strategy/fsdp2"]
    flags = {
        "trainer.accelerator": "cpu", "trainer.devices": 2, "trainer.precision": "bf16-true",
        "trainer.max_steps": STEPS, "trainer.limit_val_batches": 0, "trainer.enable_progress_bar": "false",
        "model.vocab_size": 300, "model.hidden_size": 128, "model.intermediate_size": 136,
        "model.num_hidden_layers": 2, "model.num_attention_heads": 4, "model.schedule.warmup_steps": 1,
        "data": "TextDataModule", "data.paths": f'["{corpus}"]', "data.vocab_size": 300, "data.sequence_length": 16,
        "data.batch_size": 2, "data.cache_dir": run_dir.parent / "cache",
        "checkpoint.every_n_train_steps": 2, "run_dir": run_dir,
    }  # fmt: skip
    flags |= OFTEN.get(method, {})
    configs = [f"--config={REPOSITORY / 'configs' / file}.yaml" for file in files]
    return [*configs, *(f"--{name}={value}" for name, value in flags.items())]


def fit_all(corpus: str, out: str) -> None:
    """Train with each method in OUT/METHOD, and with SST also from step 2 on, in OUT/sst_resumed."""
    torch.set_num_threads(1)
    for method in METHODS:
        main(["fit", *fit_flags(method, corpus, Path(out, method))])
    resume = f"--ckpt_path={Path(out, 'sst', 'checkpoints', BETWEEN)}"
    main(["fit", *fit_flags("sst", corpus, Path(out, "sst_resumed")), resume])
