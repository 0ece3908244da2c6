"""Train tiny models. Each rank writes a hash of each batch, and the loss, to ``log.RANK``. Some runs are killed."""

import json
import os
import signal
from hashlib import sha256
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from cola_lightning.callbacks import SourceTokenCounter
from cola_lightning.data import C4DataModule
from cola_lightning.training.module import LanguageModel

STEPS, ACCUMULATE, SAVE_EVERY = 10, 2, 3


class Witness(L.Callback):
    """Logs a hash of each batch and its loss, and kills the process after optimizer step ``kill_at``."""

    def __init__(self, file: Path, kill_at: int | None) -> None:
        self.file, self.kill_at = file, kill_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        digest = sha256(b"".join(batch[name].numpy().tobytes() for name in ("input_ids", "labels"))).hexdigest()[:16]
        with self.file.open("a") as log:
            log.write(f"{trainer.fit_loop.epoch_loop.batch_idx} {digest} {outputs['loss'].item().hex()}\n")
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(run: dict) -> None:
    """Train as one of the ranks of a run."""
    rank = int(os.environ.get("RANK", 0))
    folder = Path(run["folder"])
    world = run["ranks"]
    L.seed_everything(1)
    data = C4DataModule(**run["data"])
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=run.get("steps", STEPS),
        accumulate_grad_batches=ACCUMULATE,
        limit_val_batches=run.get("val_batches", 0),
        val_check_interval=4 * ACCUMULATE,
        check_val_every_n_epoch=None,
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            ModelCheckpoint(folder, every_n_train_steps=SAVE_EVERY, save_top_k=-1, filename="{step}"),
            Witness(folder / f"log.{rank}", run.get("kill_at")),
            SourceTokenCounter(),
        ],
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LanguageModel(vocab_size=300, **sizes)
    trainer.fit(model, data, ckpt_path=run.get("from"), weights_only=True)
    (folder / f"logged.{rank}").write_text(json.dumps({k: float(v) for k, v in trainer.callback_metrics.items()}))
    (folder / f"counts.{rank}").write_text(json.dumps(data.source_counts()))
